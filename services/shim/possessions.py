"""What a process has: the same before and after it was a container's shim, or it is used up.

A process that goes from one container to the next must have nothing left of the former: no file,
no child, no thread, no task. That is not reasoned about, but looked at.
"""

from __future__ import annotations

import asyncio
import os
import threading
from dataclasses import fields
from typing import Self

from services.common import small_files
from services.common.frozen import frozen

_FDS = "/proc/self/fd"
_TURNS = 5
_LOOKS = 25
_PAUSE_S = 0.002
_THREAD_END_S = 0.5


@frozen
class Possessions:
    """What the process has at some moment.

    Attributes:
        files: what each of its descriptors is, by number, but for standard error: each container's
            shim has another.
        threads: how many, of Python's and of others.
        tasks: how many run in its event loop.
        children: whether it has any.
        cgroups: those that it is in.
        directory: its working directory.
    """

    files: dict[str, str]
    threads: int
    tasks: int
    children: bool
    cgroups: bytes
    directory: str

    @classmethod
    def now(cls) -> Self:
        """What it has now; a few dozen calls of the kernel."""
        # The listing's own descriptor is in it, with the same number if all others are the same.
        files = {name: _target(name) for name in os.listdir(_FDS) if name != "2"}  # noqa: PTH208
        return cls(
            files=files,
            threads=len(os.listdir("/proc/self/task")),  # noqa: PTH208
            tasks=len(asyncio.all_tasks()),
            children=_has_children(),
            cgroups=small_files.read("/proc/self/cgroup"),
            directory=os.getcwd(),  # noqa: PTH109
        )

    def beside(self, before: Possessions) -> dict[str, object]:
        """What is different from before, by name; empty: nothing."""
        found = {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if getattr(self, field.name) != getattr(before, field.name)
        }
        if "files" in found:
            found["files"] = dict(self.files.items() ^ before.files.items())
        return found


async def left_over(before: Possessions) -> dict[str, object]:
    """What the process has that it had not before, once all that is about to go has gone."""
    for thread in threading.enumerate():
        if not thread.daemon and thread is not threading.main_thread():  # the exporter's is one
            thread.join(_THREAD_END_S)  # it was told to end, and has nothing to do
    found = Possessions.now().beside(before)
    for look in range(_LOOKS):
        if not found:
            break
        # What was closed is closed in the loop's next turns; nothing tells that a thread which has
        # ended has left the kernel, too.
        await asyncio.sleep(0 if look < _TURNS else _PAUSE_S)
        found = Possessions.now().beside(before)
    return found


def _target(fd: str) -> str:
    try:
        return os.readlink(f"{_FDS}/{fd}")  # noqa: PTH115
    except FileNotFoundError:  # the listing's own
        return ""


def _has_children() -> bool:
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True
