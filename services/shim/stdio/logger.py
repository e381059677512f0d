"""A ``binary://`` logger: a program that reads a process' pipes itself, as upstream starts it.

It gets stdout, stderr and a pipe on descriptors 3, 4 and 5, the container's id and namespace in its
environment, and says that it is ready by closing the third (or writing to it).
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
from typing import TYPE_CHECKING, Any, Self

import structlog

from services.common.errors import FailedPrecondition
from services.shim.futures import finish
from services.shim.runtimes.programs import ENVIRONMENT

if TYPE_CHECKING:
    from collections.abc import Mapping

    from services.shim.reaper import Exit, Reaper
    from services.shim.stdio.uris import Logger

log = structlog.get_logger(__name__)

_READY_LIMIT_S = 10.0
_END_LIMIT_S = 10.0
# Between the closing of a dying process' descriptors and the news of its death.
_DEATH_LIMIT_S = 0.01
_FIRST_FREE_FD = 10


class LoggerProcess:
    """A running logger; ``stdout`` and ``stderr`` are the ends to write to."""

    def __init__(self, pid: int, end: asyncio.Future[Exit], stdout: int, stderr: int) -> None:
        self.stdout = stdout
        self.stderr = stderr
        self._pid = pid
        self._end = end

    def pack(self) -> dict[str, Any]:
        """What the next image of the shim has to know."""
        return {"pid": None if self._end.done() else self._pid}

    @classmethod
    def unpack(cls, saved: Mapping[str, Any], reaper: Reaper) -> Self:
        """The logger that was packed; its pipes are others' by now."""
        end = reaper.expect(saved["pid"])
        return cls(saved["pid"] or 0, end, -1, -1)

    async def stop(self) -> None:
        """Give it time to finish what it has read after its pipes closed, then end it."""
        for signum in (0, signal.SIGTERM, signal.SIGKILL):
            if signum and not self._end.done():
                log.warning("logger does not end", logger_pid=self._pid, signal=signum)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._pid, signum)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_END_LIMIT_S):
                    await asyncio.shield(self._end)
                    return


async def start_logger(
    reaper: Reaper, logger: Logger, *, container_id: str, namespace: str
) -> LoggerProcess:
    """Start a logger and wait until it is ready.

    Raises:
        FailedPrecondition: it cannot be started, or is not ready in time.
    """
    fds = _Pipes()
    try:
        pid, end = reaper.spawn(
            [str(logger.path), *logger.arguments],
            stdin=fds.null,
            stdout=fds.null,
            stderr=2,
            environment={
                **ENVIRONMENT,
                "CONTAINER_ID": container_id,
                "CONTAINER_NAMESPACE": namespace,
            },
            more=[(fds.out_read, 3), (fds.err_read, 4), (fds.ready_write, 5)],
        )
    except OSError as error:
        fds.close_all()
        raise FailedPrecondition(
            f"logger {logger.path} cannot be started: {error.strerror}", field="stdout"
        ) from error
    fds.close_theirs()
    try:
        async with asyncio.timeout(_READY_LIMIT_S):
            await _readable(fds.ready_read)
    except TimeoutError as error:
        os.kill(pid, signal.SIGKILL)
        fds.close_ours()
        raise FailedPrecondition(
            f"logger {logger.path} was not ready within {_READY_LIMIT_S:.0f} s", field="stdout"
        ) from error
    if await _is_dead(fds.ready_read, end):
        fds.close_ours()
        raise FailedPrecondition(
            f"logger {logger.path} ended with {end.result().code} before it was ready",
            field="stdout",
        )
    os.close(fds.ready_read)
    return LoggerProcess(pid, end, fds.out_write, fds.err_write)


async def _is_dead(ready_read: int, end: asyncio.Future[Exit]) -> bool:
    """Whether it failed instead of being ready: both close its end of the pipe."""
    if os.read(ready_read, 1):
        return False
    await asyncio.wait([end], timeout=_DEATH_LIMIT_S)
    return end.done() and end.result().code != 0


class _Pipes:
    """Three pipes; the ends that are handed over lie above the numbers that they get there."""

    def __init__(self) -> None:
        self.null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        out_read, self.out_write = os.pipe2(os.O_CLOEXEC)
        err_read, self.err_write = os.pipe2(os.O_CLOEXEC)
        self.ready_read, ready_write = os.pipe2(os.O_CLOEXEC)
        self.out_read, self.err_read, self.ready_write = map(
            _move_up, (out_read, err_read, ready_write)
        )

    def close_theirs(self) -> None:
        for fd in (self.null, self.out_read, self.err_read, self.ready_write):
            os.close(fd)

    def close_ours(self) -> None:
        for fd in (self.out_write, self.err_write, self.ready_read):
            os.close(fd)

    def close_all(self) -> None:
        self.close_theirs()
        self.close_ours()


def _move_up(fd: int) -> int:
    moved = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _FIRST_FREE_FD)
    os.close(fd)
    return moved


async def _readable(fd: int) -> None:
    loop = asyncio.get_running_loop()
    readable: asyncio.Future[None] = loop.create_future()
    loop.add_reader(fd, finish, readable, None)
    try:
        await readable
    finally:
        loop.remove_reader(fd)
