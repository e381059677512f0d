"""Has the kernel ready for a process to be moved between cgroups, just before a runtime moves one.

Whoever writes to a ``cgroup.procs`` takes the kernel's ``cgroup_threadgroup_rwsem`` as a writer
(``cgroup_attach_lock`` in kernel/cgroup/cgroup.c). It favours its readers, who fork and exit: a
writer waits for a grace period of RCU first, 6 to 16 ms, unless another one was there less than
a grace period ago (``rcu_sync_enter`` and ``rcu_sync_exit`` in kernel/rcu/sync.c). So the first
move in a while is slow, and it is always the runtime's, with a client waiting for it.

Here the grace period goes by earlier, beside what comes before the runtime: containerd writes its
own process into the cgroup in which it is. That takes the same lock and moves nothing. It holds
``cgroup_mutex`` while it waits, as every move does: somebody else's waits no longer than it would
have by itself. Where cgroups are mounted with ``favordynmods`` no writer ever waits, and this costs
some system calls.

It is a hint and nothing depends on it: what does not work is logged once, and not tried again.
"""

from __future__ import annotations

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Self

import structlog

from services.common.background import Background
from services.containerd.uninterrupted import uninterrupted

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

log = structlog.get_logger(__name__)

ROOT = Path("/sys/fs/cgroup")
PROC = Path("/proc/self/cgroup")
_PAUSE_S = 0.01  # the least grace period that was seen lasted longer: until then moves are quick
_ITSELF = b"0"


class CgroupMoves:
    """Owns the thread that writes. An async context manager.

    Args:
        root: where cgroups are mounted.
        proc: tells the cgroups of this process.
        write: takes the lock by a file, waiting as long as that takes.
    """

    def __init__(
        self,
        *,
        root: Path = ROOT,
        proc: Path = PROC,
        write: Callable[[Path], None] | None = None,
    ) -> None:
        self._root = root
        self._proc = proc
        self._write = write or write_itself
        self._checked = "", Path()
        self._expected = asyncio.Event()
        self._background = Background()
        # Its own: the loop's threads are few, and do what somebody waits for.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="cgroup-moves")

    async def __aenter__(self) -> Self:
        self._background.start(self._run(), name="cgroup moves")
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._background.stop()
        self._thread.shutdown()

    def expect(self) -> None:
        """Note that a process is likely to be moved soon; returns at once.

        Calls that come while one is being served, or shortly after, are served together.
        """
        self._expected.set()

    async def _run(self) -> None:
        while True:
            await self._expected.wait()
            self._expected.clear()
            try:
                await uninterrupted(self._in_thread())
            except OSError as error:
                log.info("moves between cgroups are not sped up", reason=str(error))
                return
            await asyncio.sleep(_PAUSE_S)

    async def _in_thread(self) -> None:
        await asyncio.get_running_loop().run_in_executor(self._thread, self._take_lock)

    def _take_lock(self) -> None:
        # Read each time: this process may have been moved, and must not be moved back.
        lines = self._proc.read_text()
        checked, file = self._checked
        if lines != checked:
            file = own_cgroup(lines, self._root) / "cgroup.procs"
            if str(os.getpid()) not in file.read_text().split():
                raise FileNotFoundError(f"{file} is not that of this process")
            self._checked = lines, file
        self._write(file)


def own_cgroup(lines: str, root: Path) -> Path:
    """The directory of one cgroup that a process is in; any will do, as the lock is one for all.

    Args:
        lines: what proc(5) says of its cgroups.
        root: where they are mounted: the v2 hierarchy itself, or a directory per v1 hierarchy.

    Raises:
        FileNotFoundError: none is mounted, or only parts in which it is not.
    """
    pure = (root / "cgroup.controllers").exists()
    for line in lines.splitlines():
        _, names, path = line.split(":", 2)
        if ".." in path.split("/"):  # outside of this process' cgroup namespace
            continue
        hierarchy = root / names.partition(",")[0].removeprefix("name=")
        if not names and not pure:
            hierarchy = root / "unified"
        directory = hierarchy / path.lstrip("/")
        if (directory / "cgroup.procs").exists():
            return directory
    raise FileNotFoundError(f"no cgroup of this process is mounted at {root}")


def write_itself(file: Path) -> None:
    """Move this process to the cgroup of ``cgroup.procs``; blocks for a grace period."""
    fd = os.open(file, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, _ITSELF)
    finally:
        os.close(fd)
