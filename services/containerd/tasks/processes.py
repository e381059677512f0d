"""Processes that are not our children: named for ever, watched and signalled through a pidfd.

A pid alone is used again by the kernel; with its start time it names one process. The pidfd is
opened first and the start time compared then, so what the descriptor holds is what was meant.
"""

from __future__ import annotations

import asyncio
import os
import signal
from typing import TYPE_CHECKING, Self

from services.common import linux
from services.common.frozen import frozen

if TYPE_CHECKING:
    from types import TracebackType

_PID_MAX = 1 << 22  # proc(5), pid_max


@frozen
class ProcessId:
    """A process by pid and start time (clock ticks since boot)."""

    pid: int
    start_time: int

    def alive(self) -> bool:
        """Whether it runs now."""
        return linux.process_start_time(self.pid) == self.start_time


class ProcessHandle:
    """A pidfd; close it, or use it in a ``with`` block."""

    def __init__(self, process: ProcessId, fd: int) -> None:
        self.process = process
        self._fd = fd

    @classmethod
    def open(cls, process: ProcessId) -> Self | None:
        """A handle of ``process``; None when it has ended, or that is no pid."""
        if not 0 < process.pid <= _PID_MAX:
            return None
        try:
            fd = os.pidfd_open(process.pid)
        except ProcessLookupError:
            return None
        if process.alive():
            return cls(process, fd)
        os.close(fd)
        return None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self._fd)

    def send_signal(self, signum: int) -> None:
        """Send a signal; nothing happens when the process has ended."""
        try:
            signal.pidfd_send_signal(self._fd, signum)
        except ProcessLookupError:
            return

    async def ended(self) -> None:
        """Return once the process has ended."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        loop.add_reader(self._fd, lambda: None if future.done() else future.set_result(None))
        try:
            await future
        finally:
            loop.remove_reader(self._fd)

    async def kill(self, *, timeout_s: float) -> bool:
        """SIGKILL the process; returns whether it ended within the time limit."""
        self.send_signal(signal.SIGKILL)
        try:
            async with asyncio.timeout(timeout_s):
                await self.ended()
        except TimeoutError:
            return False
        return True

    def exit_status(self) -> int | None:
        """The true status of a process that has ended, 128 plus the number of a signal.

        None where the kernel cannot tell (before Linux 6.15, or nobody has reaped it yet).
        """
        status = linux.pidfd_exit_status(self._fd)
        if status is None:
            return None
        code = os.waitstatus_to_exitcode(status)
        return code if code >= 0 else 128 - code
