"""The one place in a shim that waits for children: its own, and the orphans below it.

A shim is a subreaper (prctl(2)): the container's init and exec processes, which the runtime made
and left, become its children. Their pids are known only once the runtime has said so, and they may
have ended by then: an open :class:`Window` keeps the exits that nobody claimed. Whatever else is
reaped was orphaned inside the container, and is only counted.

SIGCHLD arrives through the event loop, so nothing is reaped between a spawn and the lines that
follow it up to the next await.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from services.common import linux
from services.common.frozen import frozen
from services.shim.futures import finish

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

log = structlog.get_logger(__name__)

_ORPHAN_LIMIT_S = 2.0
_ORPHAN_PAUSE_S = 0.005
_RESET_SIGNALS = (
    signal.SIGPIPE,
    signal.SIGCHLD,
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGXFSZ,
)


@frozen
class Exit:
    """The end of one process.

    Attributes:
        pid: its process id, free again.
        wait_status: as wait(2) gives it.
        exited_at_ns: when it was reaped, nanoseconds since the epoch.
        user_us: processor time in user mode, its reaped children's included, microseconds.
        system_us: likewise in the kernel.
        max_rss_bytes: its largest resident set.
        reaped: by this shim, which knows the figures above; otherwise it was no child of ours.
        lost: why its status is not known, or empty.
    """

    pid: int
    wait_status: int
    exited_at_ns: int
    user_us: int = 0
    system_us: int = 0
    max_rss_bytes: int = 0
    reaped: bool = True
    lost: str = ""

    @property
    def signal(self) -> int:
        """The signal that ended it, or 0."""
        return os.WTERMSIG(self.wait_status) if os.WIFSIGNALED(self.wait_status) else 0

    @property
    def code(self) -> int:
        """Exit code, or 128 and the signal, as shells and containerd count."""
        return 128 + self.signal if self.signal else os.WEXITSTATUS(self.wait_status)


def _unseen(pid: int, *, wait_status: int = 0, lost: str = "") -> Exit:
    return Exit(pid, wait_status, time.time_ns(), reaped=False, lost=lost)


class Window:
    """Exits of processes that nobody knew, for as long as the window is open."""

    def __init__(self) -> None:
        self._exits: dict[int, Exit] = {}

    def add(self, ended: Exit) -> None:
        """Keep an exit."""
        self._exits[ended.pid] = ended

    def take(self, pid: int) -> Exit | None:
        """The exit of ``pid``, unless a process with that id is there now (it was used again)."""
        ended = self._exits.pop(pid, None)
        return None if ended is None or Path(f"/proc/{pid}").exists() else ended


class Reaper:
    """Waits for all children of this process. ``start`` before anything is spawned.

    Attributes:
        zombies_reaped: children that nobody waited for.
        spawned: set once a program was started.
    """

    def __init__(self) -> None:
        self.zombies_reaped = 0
        self.spawned = asyncio.Event()
        self._watches: dict[int, Callable[[Exit], None]] = {}
        self._windows: list[Window] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._orphans: list[tuple[int, int, Callable[[Exit], None]]] = []
        self._orphan_ends: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Become a subreaper and listen for SIGCHLD in the running event loop. Idempotent."""
        if self._loop is not None:
            return
        linux.set_child_subreaper()
        self._loop = asyncio.get_running_loop()
        self._loop.add_signal_handler(signal.SIGCHLD, self._reap)
        # Children of an earlier image may have ended while nobody listened.
        self._loop.call_soon(self._reap)
        for orphan in self._orphans:
            self._follow(*orphan)
        self._orphans.clear()

    def stop(self) -> None:
        """Listen no more, and be no subreaper."""
        if self._loop is not None:
            self._loop.remove_signal_handler(signal.SIGCHLD)
            linux.set_child_subreaper_off()

    def spawn(
        self,
        argv: Sequence[str],
        *,
        stdin: int,
        stdout: int,
        stderr: int,
        environment: Mapping[str, str],
        more: Sequence[tuple[int, int]] = (),
        executable: str = "",
    ) -> tuple[int, asyncio.Future[Exit]]:
        """Start a program (an absolute path in ``argv[0]``); returns its pid and its future end.

        Args:
            argv: program and arguments.
            stdin: descriptor that becomes its standard input.
            stdout: likewise standard output.
            stderr: likewise standard error.
            environment: all of its environment.
            more: further (ours, its) descriptors, ours being above all of its.
            executable: the file to execute, where it is not ``argv[0]``.

        Raises:
            OSError: the program cannot be started.
        """
        actions = [
            (os.POSIX_SPAWN_DUP2, ours, theirs)
            for ours, theirs in [(stdin, 0), (stdout, 1), (stderr, 2), *more]
        ]
        pid = os.posix_spawn(
            executable or argv[0],
            list(argv),
            dict(environment),
            file_actions=actions,
            setsigmask=[],
            setsigdef=_RESET_SIGNALS,
        )
        future: asyncio.Future[Exit] = asyncio.get_running_loop().create_future()
        self._watches[pid] = partial(finish, future)
        self.spawned.set()
        return pid, future

    def watch(self, pid: int, ended: Callable[[Exit], None], window: Window) -> None:
        """Call ``ended`` at the end of a process that the runtime made, be it past already."""
        early = window.take(pid)
        if early is not None:
            self.zombies_reaped -= 1
            ended(early)
        else:
            self._watches[pid] = ended

    def adopt(self, pid: int, ended: Callable[[Exit], None]) -> None:
        """Call ``ended`` at the end of a child of an earlier image; before ``start``."""
        self._watches[pid] = ended

    def adopt_orphan(self, pid: int, pidfd: int, ended: Callable[[Exit], None]) -> None:
        """Call ``ended`` at the end of a process that an earlier shim left, not before ``start``.

        Args:
            pid: its process id.
            pidfd: opened while it lived, and open until it has ended; -1: it has ended already.
            ended: to call.
        """
        if self._loop is None:
            self._orphans.append((pid, pidfd, ended))
        else:
            self._follow(pid, pidfd, ended)

    def _follow(self, pid: int, pidfd: int, ended: Callable[[Exit], None]) -> None:
        assert self._loop is not None
        if pidfd >= 0:
            self._loop.add_reader(pidfd, self._orphan_ended, pid, pidfd, ended)
        else:
            lost = "it ended while it had no shim, and no descriptor of it was kept"
            self._loop.call_soon(ended, _unseen(pid, lost=lost))

    def _orphan_ended(self, pid: int, pidfd: int, ended: Callable[[Exit], None]) -> None:
        assert self._loop is not None
        self._loop.remove_reader(pidfd)
        task = self._loop.create_task(self._learn_end(pid, pidfd, ended))
        self._orphan_ends.add(task)
        task.add_done_callback(self._orphan_ends.discard)

    async def _learn_end(self, pid: int, pidfd: int, ended: Callable[[Exit], None]) -> None:
        """Ask the kernel, which knows once the new parent has reaped the process."""
        deadline = time.monotonic() + _ORPHAN_LIMIT_S
        while (status := linux.pidfd_exit_status(pidfd)) is None:
            if time.monotonic() > deadline:
                ended(_unseen(pid, lost="it was orphaned, and the kernel does not tell its status"))
                return
            await asyncio.sleep(_ORPHAN_PAUSE_S)
        ended(_unseen(pid, wait_status=status))

    def expect(self, pid: int | None) -> asyncio.Future[Exit]:
        """The end of a child of an earlier image, or of none, which is past; before ``start``."""
        future: asyncio.Future[Exit] = asyncio.get_running_loop().create_future()
        if pid is None:
            finish(future, Exit(0, 0, time.time_ns()))
        else:
            self.adopt(pid, partial(finish, future))
        return future

    def under_way(self) -> set[asyncio.Task[None]]:
        """What goes on to learn how orphans ended."""
        return set(self._orphan_ends)

    def forget(self, pid: int) -> None:
        """Watch a process no more; it is still reaped."""
        self._watches.pop(pid, None)

    @contextmanager
    def window(self) -> Iterator[Window]:
        """Keep exits of unknown processes inside the block."""
        window = Window()
        self._windows.append(window)
        try:
            yield window
        finally:
            self._windows.remove(window)

    def _reap(self) -> None:
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            ended = Exit(
                pid=pid,
                wait_status=status,
                exited_at_ns=time.time_ns(),
                user_us=int(usage.ru_utime * 1e6),
                system_us=int(usage.ru_stime * 1e6),
                max_rss_bytes=usage.ru_maxrss * 1024,
            )
            watcher = self._watches.pop(pid, None)
            if watcher is not None:
                watcher(ended)
                continue
            self.zombies_reaped += 1
            for window in self._windows:
                window.add(ended)
