"""One run of a runtime's program: spawned, timed, its output bounded, its end awaited."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import TYPE_CHECKING

from services.common.frozen import frozen
from services.shim.runtimes import sealed
from services.shim.runtimes.programs import ENVIRONMENT
from services.shim.runtimes.runtime import RuntimeMissing

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from services.shim.reaper import Exit, Reaper
    from services.shim.runtimes.runtime import RuntimeStdio

OUTPUT_MAX_BYTES = 1 << 20
_READ_BYTES = 65536
_KILL_WAIT_S = 5.0


@frozen
class Outcome:
    """What came of a run.

    Attributes:
        ended: its exit; None when it could not even be killed.
        output: what it wrote to both streams, at most OUTPUT_MAX_BYTES; empty when the streams were
            a container's.
        timed_out: whether it was killed for want of an answer.
    """

    ended: Exit | None
    output: str
    timed_out: bool

    @property
    def succeeded(self) -> bool:
        """Whether it ended by itself with 0."""
        return self.ended is not None and not self.timed_out and self.ended.wait_status == 0

    def in_words(self) -> str:
        """How it ended, for a sentence."""
        if self.timed_out or self.ended is None:
            return "did not answer in time and was killed"
        if self.ended.signal:
            return f"was ended by signal {self.ended.signal}"
        return f"exited with {self.ended.code}"


async def run(
    reaper: Reaper,
    argv: Sequence[str],
    *,
    stdio: RuntimeStdio | None,
    timeout_s: float,
    niceness: int = 0,
) -> Outcome:
    """Run a program to its end.

    Args:
        reaper: waits for it.
        argv: an absolute path and arguments.
        stdio: streams to give it; None: nothing to read, and its output is collected.
        timeout_s: time after which it is killed.
        niceness: added to that of this process.

    Raises:
        RuntimeMissing: it cannot be started.
    """
    if stdio is not None:
        child = _spawn(reaper, argv, (stdio.stdin, stdio.stdout, stdio.stderr), niceness)
        return await _await(child, timeout_s, lambda: "")
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    output, write_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        os.set_blocking(write_end, True)
        child = _spawn(reaper, argv, (null, write_end, write_end), niceness)
    except BaseException:
        os.close(output)
        raise
    finally:
        os.close(null)
        os.close(write_end)
    collector = _Collector(output)
    try:
        return await _await(child, timeout_s, collector.text)
    finally:
        collector.close()


class _Collector:
    """Reads a pipe as it fills, keeps what fits, and drops the rest."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._data = bytearray()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(fd, self._read)

    def text(self) -> str:
        """All that was written until now."""
        while self._read():
            pass
        return self._data.decode(errors="replace")

    def close(self) -> None:
        self._loop.remove_reader(self._fd)
        os.close(self._fd)

    def _read(self) -> bool:
        try:
            data = os.read(self._fd, _READ_BYTES)
        except BlockingIOError:
            return False
        if not data:
            self._loop.remove_reader(self._fd)
            return False
        self._data += data[: OUTPUT_MAX_BYTES - len(self._data)]
        return len(self._data) < OUTPUT_MAX_BYTES


def _spawn(
    reaper: Reaper,
    argv: Sequence[str],
    streams: tuple[int, int, int],
    niceness: int,
) -> tuple[int, asyncio.Future[Exit]]:
    stdin, stdout, stderr = streams
    try:
        child = reaper.spawn(
            argv,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            environment=ENVIRONMENT,
            executable=sealed.executable(argv[0]),
        )
    except OSError as error:
        raise RuntimeMissing(
            f"runtime '{argv[0]}' cannot be started: {error.strerror}: install it, or choose "
            "another"
        ) from error
    if niceness:
        pid, _ = child  # its own until it is reaped, which is later
        os.setpriority(os.PRIO_PROCESS, pid, os.getpriority(os.PRIO_PROCESS, 0) + niceness)
    return child


async def _await(
    child: tuple[int, asyncio.Future[Exit]], timeout_s: float, text: Callable[[], str]
) -> Outcome:
    pid, future = child
    try:
        async with asyncio.timeout(timeout_s):
            return Outcome(await asyncio.shield(future), text(), False)
    except TimeoutError:
        # The pid is ours until the future is done: nobody else reaps.
        os.kill(pid, signal.SIGKILL)
    try:
        async with asyncio.timeout(_KILL_WAIT_S):
            return Outcome(await asyncio.shield(future), text(), True)
    except TimeoutError:  # in the kernel, uninterruptible
        return Outcome(None, text(), True)
