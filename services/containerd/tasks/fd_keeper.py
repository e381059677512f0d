"""The keeper of descriptors: a program of its own that outlives containerd, shims and factory.

It holds duplicates of what the shims have open, so that one that was killed can be replaced (see
``theseus-shim keeper``). Containerd starts it where there is none, and again when it dies; a
connection that is held open here tells it that there is a containerd, and tells us of its end.
"""

from __future__ import annotations

import asyncio
import json
import socket
from contextlib import suppress
from typing import TYPE_CHECKING, Self

import structlog

from services.common.background import Background
from services.containerd.uninterrupted import uninterrupted

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from types import TracebackType

log = structlog.get_logger(__name__)

_BACKOFF_S = 0.02
_BACKOFF_MAX_S = 5.0
_START_LIMIT_S = 20.0


class DescriptorKeeper:
    """Sees to it that there is a keeper. ``async with`` starts that; the keeper itself goes on.

    Args:
        program: how to run ``theseus-shim``; ``keeper --socket PATH`` is added.
        path: where the keeper listens.
    """

    def __init__(self, program: Sequence[str], path: Path) -> None:
        self.path = path
        self._program = (*program, "keeper", "--socket", str(path))
        self._background = Background()

    async def __aenter__(self) -> Self:
        self._background.start(self._supervise(), name="descriptor keeper")
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._background.stop()

    def release(self, instance_id: str) -> None:
        """Have the keeper close what it holds for a shim; one that is not there holds nothing."""
        message = json.dumps({"op": "remove", "owner": instance_id}).encode()
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.setblocking(False)
            with suppress(OSError):
                connection.connect(str(self.path))
                connection.send(message)

    async def _supervise(self) -> None:
        pause_s = 0.0
        while True:
            if await self._hold_on():  # to the one of an earlier containerd, at first
                pause_s = 0.0
                log.warning("keeper of descriptors ended")
            await asyncio.sleep(pause_s)
            pause_s = min(max(pause_s * 2, _BACKOFF_S), _BACKOFF_MAX_S)
            if failure := await self._start():
                log.error("keeper of descriptors does not start", reason=failure)

    async def _hold_on(self) -> bool:
        """Stay connected until the keeper ends; returns whether there was one."""
        loop = asyncio.get_running_loop()
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.setblocking(False)
            try:
                connection.connect(str(self.path))
            except OSError:
                return False
            with suppress(ConnectionError):
                await loop.sock_recv(connection, 1)
        return True

    def _decline(self) -> None:
        """Let a keeper that came up after all see that it is not wanted: it waits for a while."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.setblocking(False)
            with suppress(OSError):
                connection.connect(str(self.path))

    async def _start(self) -> str:
        """Run the program, which goes on in the background; returns what went wrong, or nothing."""
        try:
            process = await asyncio.create_subprocess_exec(
                *self._program,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
                start_new_session=True,
            )
        except OSError as error:
            return f"cannot execute {self._program[0]}: {error.strerror}"
        try:
            async with asyncio.timeout(_START_LIMIT_S):
                _, said = await process.communicate()
        except (TimeoutError, asyncio.CancelledError) as error:
            with suppress(ProcessLookupError):
                process.kill()
            await uninterrupted(process.communicate())
            self._decline()
            if isinstance(error, asyncio.CancelledError):
                raise
            return f"it did not serve within {_START_LIMIT_S:.0f} s"
        if process.returncode:
            return said.decode(errors="replace").strip()[-500:] or f"status {process.returncode}"
        return ""
