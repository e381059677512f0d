"""The client's side of the shim factory: a program of its own that forks shims on request.

The factory is ours: it is started with containerd, or a little later, since its start takes a
processor for half a second. It is started again when it dies, and ends when the pipe that is its
standard input closes, which happens also when containerd is killed. Shims do not notice. One
connection carries one request and one reply; the reply comes from the shim itself, once it serves,
so that the factory may die in between.

    containerd ──connect, request──▶ factory ──fork──▶ shim ──reply──▶ containerd
"""

from __future__ import annotations

import asyncio
import json
import socket
import time
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol, Self

import structlog

from services.common import tracing
from services.common.background import Background
from services.common.log import request_id
from services.containerd.tasks.line import (
    REPLY_MAX_BYTES,
    ended_early,
    not_in_time,
    read_answer,
)
from services.containerd.tasks.shim import ShimAddress
from services.containerd.tasks.waiting import WaitingShims
from services.containerd.uninterrupted import uninterrupted

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from types import TracebackType

    from services.containerd.tasks.shim import ShimRequest
    from services.containerd.tasks.waiting import Dial

log = structlog.get_logger(__name__)

_RETRY_S = 0.01
_BACKOFF_S = 0.02
_BACKOFF_MAX_S = 5.0
_STABLE_S = 10.0
_STOP_S = 2.0
_DEATH_NOTICE_S = 0.1


class ShimLauncher(Protocol):
    """Starts shims of one kind."""

    async def start_shim(self, request: ShimRequest, *, timeout_s: float = 30.0) -> ShimAddress:
        """Start a shim; returns once it serves, or before that if the request says so.

        Raises:
            ShimStartFailed: it could not; nothing of it is left but its log (see ``line.py``).
            DeadlineExceeded: it was not ready in time; it may come up later.
        """


class FactoryClient:
    """Runs the factory and asks it for shims. ``async with`` starts and stops the program.

    Args:
        program: how to run ``theseus-shim``; ``factory --socket PATH`` is added.
        socket: where the factory listens.
        registry: containerd's main socket, where shims register.
        default_runtime: OCI runtime of containers that name none.
        log_level: of the shims.
        keeper: where the keeper of descriptors listens, for shims; None for none.
        places: directory of the sockets of shims that wait; None: that of ``socket``.
        waiting: how many shims wait ready.
        dial: connects to one that waits.
        at_once: whether the program is started at the beginning, and not by :meth:`begin`.
    """

    def __init__(
        self,
        program: Sequence[str],
        *,
        socket: Path,
        registry: Path,
        default_runtime: str = "runc",
        log_level: str = "info",
        keeper: Path | None = None,
        places: Path | None = None,
        waiting: int = 0,
        dial: Dial | None = None,
        at_once: bool = True,
    ) -> None:
        self._wanted = asyncio.Event()
        if at_once:
            self._wanted.set()
        self._keeper = keeper
        self._program = (*program, "factory", "--socket", str(socket))
        self._socket = socket
        self._registry = registry
        self._default_runtime = default_runtime
        self._log_level = log_level
        self._background = Background()
        self._process: asyncio.subprocess.Process | None = None
        self.starts = 0
        self.waiting = WaitingShims(
            factory=socket, places=places or socket.parent, number=waiting, dial=dial
        )

    async def __aenter__(self) -> Self:
        self._background.start(self._run_on_demand(), name="shim factory")
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._background.stop()

    def begin(self) -> None:
        """Start the program now, if it does not run; the first request for a shim does that too."""
        self._wanted.set()

    async def start_shim(self, request: ShimRequest, *, timeout_s: float = 30.0) -> ShimAddress:
        """As :meth:`ShimLauncher.start_shim`; waits for a factory that is being restarted."""
        self.begin()
        place = self.waiting.place
        message = json.dumps(
            {
                "namespace": request.namespace,
                "id": request.id,
                "bundle": str(request.bundle),
                "socket": str(request.socket),
                "registry": str(self._registry),
                "instance_id": request.instance_id,
                "default_runtime": self._default_runtime,
                "request_id": request_id.get(),
                "log_level": self._log_level,
                "adopt": request.adopt,
                **({"keeper": str(self._keeper)} if self._keeper is not None else {}),
                **({"then_wait_in": str(place)} if place is not None else {}),
            }
        ).encode()
        with tracing.span("shim from the factory"):
            address = await self._ask_one_that_waits(message, request, timeout_s)
            if address is not None:
                return address
            try:
                async with asyncio.timeout(timeout_s):
                    reply, connection = await self._ask(message)
            except TimeoutError:
                raise not_in_time(request, timeout_s) from None
        try:
            if not reply:
                raise await asyncio.to_thread(ended_early, request)
            address = read_answer(reply, request)
            if place is None:
                connection.close()
                return address
            return replace(address, line=self.waiting.remember(connection, address))
        except BaseException:
            connection.close()
            raise

    async def _ask_one_that_waits(
        self, message: bytes, request: ShimRequest, timeout_s: float
    ) -> ShimAddress | None:
        """A shim that has waited; None where none has taken the request."""
        while (line := self.waiting.take()) is not None:
            try:
                line.ask(message, request, limit_s=timeout_s)
            except ConnectionError as error:
                line.close()
                log.info("waiting shim is gone", error=str(error))
                continue
            address = f"unix://{request.socket}"
            if request.ahead or await line.serves():
                return ShimAddress(line.process, address, line.version, line)
            log.info("waiting shim is gone", pid=line.process.pid)
        return None

    async def _ask(self, message: bytes) -> tuple[bytes, socket.socket]:
        """One request; again while there is no factory to take it, or it died over it.

        Returns:
            The reply, empty if there was none, and the connection, the caller's to close.
        """
        loop = asyncio.get_running_loop()
        while True:
            factory = self._process
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            try:
                connection.setblocking(False)
                # Not sock_connect: a full backlog is EAGAIN here, and nothing tells when it is no
                # longer full.
                connection.connect(str(self._socket))
                await loop.sock_sendall(connection, message)
                reply = await loop.sock_recv(connection, REPLY_MAX_BYTES)
                if reply or (factory is not None and not await _is_dead(factory)):
                    return reply, connection
            except (BlockingIOError, ConnectionError, FileNotFoundError):
                pass
            except BaseException:
                connection.close()
                raise
            connection.close()
            # No request was forked off without keeping its connection open: asking again is safe.
            await asyncio.sleep(_RETRY_S)

    async def _run_on_demand(self) -> None:
        await self._wanted.wait()
        self._background.start(self.waiting.run(), name="waiting shims")
        await self._supervise()

    async def _supervise(self) -> None:
        backoff_s = _BACKOFF_S
        while True:
            began = time.monotonic()
            status = await self._run()
            lived_s = time.monotonic() - began
            log.error("shim factory ended", status=status, lived_s=round(lived_s, 3))
            backoff_s = _BACKOFF_S if lived_s > _STABLE_S else min(backoff_s * 2, _BACKOFF_MAX_S)
            await asyncio.sleep(backoff_s)

    async def _run(self) -> int | str:
        """Run the program to its end, or until this task is cancelled, which ends it."""
        try:
            process = await asyncio.create_subprocess_exec(
                *self._program,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as error:
            return f"cannot execute {self._program[0]}: {error.strerror}"
        self._process = process
        self.starts += 1
        log.debug("shim factory started", pid=process.pid)
        try:
            return await process.wait()
        finally:
            await uninterrupted(_stop(process))


async def _is_dead(process: asyncio.subprocess.Process) -> bool:
    """Whether the program has ended, given the moment that it takes to hear of it."""
    try:
        async with asyncio.timeout(_DEATH_NOTICE_S):
            await process.wait()
    except TimeoutError:
        return False
    return True


async def _stop(process: asyncio.subprocess.Process) -> None:
    """Close the program's input and see it end."""
    if process.stdin is not None:
        process.stdin.close()
    try:
        async with asyncio.timeout(_STOP_S):
            await process.wait()
    except TimeoutError:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
