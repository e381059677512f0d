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
from typing import TYPE_CHECKING, Protocol, Self

import structlog

from services.common import tracing
from services.common.background import Background
from services.common.errors import DeadlineExceeded, Internal, Unavailable
from services.common.log import request_id
from services.containerd.tasks.processes import ProcessId
from services.containerd.tasks.shim import ShimAddress
from services.containerd.tasks.waiting import WaitingShims
from services.containerd.uninterrupted import uninterrupted

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from types import TracebackType

    from services.containerd.tasks.shim import ShimRequest

log = structlog.get_logger(__name__)

_REPLY_MAX_BYTES = 65536
_RETRY_S = 0.01
_BACKOFF_S = 0.02
_BACKOFF_MAX_S = 5.0
_STABLE_S = 10.0
_STOP_S = 2.0
_DEATH_NOTICE_S = 0.1
_LOG_TAIL_BYTES = 2000


class ShimStartFailed(Internal):
    """A shim did not come up; the message has its own words."""


class ShimLauncher(Protocol):
    """Starts shims of one kind."""

    async def start_shim(self, request: ShimRequest, *, timeout_s: float = 30.0) -> ShimAddress:
        """Start a shim; returns once it serves.

        Raises:
            ShimStartFailed: it could not; nothing of it is left but its log.
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
        self.waiting = WaitingShims(factory=socket, places=places or socket.parent, number=waiting)

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
            }
        ).encode()
        try:
            with tracing.span("shim from the factory"):
                async with asyncio.timeout(timeout_s):
                    reply = await self._ask_one_that_waits(message) or await self._ask(message)
        except TimeoutError:
            raise DeadlineExceeded(
                f"no shim for '{request.id}' within {timeout_s:g} s: see {request.bundle}/shim.log "
                "and the log of the shim factory"
            ) from None
        return await asyncio.to_thread(_parse_reply, reply, request)

    async def _ask_one_that_waits(self, message: bytes) -> bytes | None:
        """The answer of a shim that waits ready; None where none has taken the request."""
        loop = asyncio.get_running_loop()
        while (connection := self.waiting.take()) is not None:
            with connection:
                try:
                    await loop.sock_sendall(connection, message)
                    return await loop.sock_recv(connection, _REPLY_MAX_BYTES)
                except ConnectionError as error:
                    # It ended before it read the request, or the kernel would not say so.
                    log.info("waiting shim is gone", error=error.strerror)
        return None

    async def _ask(self, message: bytes) -> bytes:
        """One request; again while there is no factory to take it, or it died over it."""
        loop = asyncio.get_running_loop()
        while True:
            factory = self._process
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
                connection.setblocking(False)
                try:
                    # Not sock_connect: a full backlog is EAGAIN here, and nothing tells when it
                    # is no longer full.
                    connection.connect(str(self._socket))
                    await loop.sock_sendall(connection, message)
                    reply = await loop.sock_recv(connection, _REPLY_MAX_BYTES)
                except (BlockingIOError, ConnectionError, FileNotFoundError):
                    reply = None
            if reply or (reply == b"" and factory is not None and not await _is_dead(factory)):
                return reply
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


def _parse_reply(reply: bytes, request: ShimRequest) -> ShimAddress:
    if not reply:
        raise ShimStartFailed(
            f"the shim of '{request.id}' ended before it served: {_log_tail(request.bundle)}"
        )
    try:
        data = json.loads(reply)
        if error := data.get("error"):
            raise ShimStartFailed(f"the shim of '{request.id}' did not start: {error}")
        return ShimAddress(
            ProcessId(int(data["pid"]), int(data["start_time"])),
            str(data["address"]),
            str(data["version"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Unavailable("the shim factory's reply makes no sense: is it another version?") from (
            error
        )


def _log_tail(bundle: Path) -> str:
    try:
        text = (bundle / "shim.log").read_bytes()[-_LOG_TAIL_BYTES:].decode(errors="replace")
    except FileNotFoundError:
        return "it left no log"
    return " | ".join(text.split("\n")[-4:]).strip(" |") or "its log is empty"
