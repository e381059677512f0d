"""The cgroup of a container: who is in it, what it used, whether memory ran out; v1, v2 and both.

Paths are found once, from proc(5), while the container's init waits to be started; whether they are
there is looked up when one is needed: there are a dozen, of which most never are. A container
without a cgroup of its own (its paths are the shim's, or the root) is never signalled through it.
Kernel documents: admin-guide/cgroup-v1, admin-guide/cgroup-v2.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from services.common import small_files
from services.common.frozen import frozen

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

ROOT = Path("/sys/fs/cgroup")
_PID_CONTROLLERS = ("pids", "memory", "freezer", "name=systemd", "devices", "cpu")
_KILL_LIMIT_S = 5.0
_KILL_PAUSE_S = 0.002


@frozen
class Cgroup:
    """Directories of one cgroup.

    Attributes:
        controllers: directory per v1 controller, a named hierarchy as ``name=x``; not all of them
            need be mounted here (see :meth:`directory`).
        unified: directory in the v2 hierarchy, or None.
        own: whether it is the container's alone.
    """

    controllers: Mapping[str, str]
    unified: Path | None
    own: bool

    def pack(self) -> dict[str, Any]:
        """The cgroup as plain data, for :meth:`unpack`."""
        return {
            "controllers": dict(self.controllers),
            "unified": str(self.unified) if self.unified is not None else None,
            "own": self.own,
        }

    @classmethod
    def unpack(cls, saved: Mapping[str, Any]) -> Self:
        """The cgroup that was packed."""
        return cls(
            controllers=saved["controllers"],
            unified=Path(saved["unified"]) if saved["unified"] is not None else None,
            own=saved["own"],
        )

    def directory(self, controller: str) -> Path | None:
        """Directory in the hierarchy of a v1 controller, if it is there."""
        path = self.controllers.get(controller, "")
        return Path(path) if os.path.isdir(path) else None  # noqa: PTH112 - most are only looked at

    @property
    def in_v1(self) -> bool:
        """Whether it has a directory in the hierarchy of any v1 controller."""
        return any(self.directory(name) is not None for name in self.controllers)

    def processes(self) -> list[int]:
        """Pids of everything inside, nested cgroups included; empty when it is gone."""
        directory = self._process_directory()
        found: set[int] = set()
        for path in _descend(directory) if directory else ():
            found.update(_pids(path / "cgroup.procs"))
        return sorted(found)

    def kill_all(self) -> bool:
        """SIGKILL everything inside and wait until it is empty. Blocks, at most 5 seconds.

        Returns:
            Whether nothing is left.
        """
        if not self.own:
            return True
        kill_file = self.unified / "cgroup.kill" if self.unified else None
        if kill_file is not None and kill_file.exists():
            kill_file.write_text("1")
        deadline = time.monotonic() + _KILL_LIMIT_S
        while pids := self.processes():
            for pid in pids:
                _kill(pid)
            if time.monotonic() > deadline:
                return False
            # The kernel tells nobody when a v1 cgroup is empty.
            time.sleep(_KILL_PAUSE_S)
        return True

    def oom_kills(self) -> int:
        """How often the kernel killed something inside for lack of memory."""
        if (memory := self.directory("memory")) is not None:
            return read_table(memory / "memory.oom_control").get("oom_kill", 0)
        if self.unified is not None:
            return read_table(self.unified / "memory.events").get("oom_kill", 0)
        return 0

    def _process_directory(self) -> Path | None:
        return self.directory(_process_hierarchy(self.controllers)) or self.unified


def of_process(pid: int, *, root: Path = ROOT, proc: Path = Path("/proc")) -> Cgroup:
    """The cgroup that a process is in now.

    Raises:
        OSError: there is no such process.
    """
    theirs = _parse(small_files.read(f"{proc}/{pid}/cgroup").decode())
    ours = _parse(small_files.read(f"{proc}/self/cgroup").decode())
    controllers = {
        name: f"{root}/{name.removeprefix('name=')}/{path.lstrip('/')}"
        for name, path in theirs.items()
        if name
    }
    own = _is_own(_process_hierarchy(controllers), theirs, ours)
    pure = (root / "cgroup.controllers").exists()
    unified = (root if pure else root / "unified") / theirs.get("", "/").lstrip("/")
    # On a hybrid host the v2 part may be shared with the shim, whatever the v1 part is.
    usable = (pure or _is_own("", theirs, ours)) and unified.is_dir()
    return Cgroup(controllers=controllers, unified=unified if usable else None, own=own)


def _process_hierarchy(controllers: Mapping[str, str]) -> str:
    """The one that processes are looked for in, by its controller; empty: that of v2.

    It decides whether a cgroup is its container's own.
    """
    there = (n for n in _PID_CONTROLLERS if os.path.isdir(controllers.get(n, "")))  # noqa: PTH112
    return next(there, "")


def _is_own(controller: str, theirs: Mapping[str, str], ours: Mapping[str, str]) -> bool:
    path = theirs.get(controller, "/")
    return path not in ("/", ours.get(controller))


def read_table(path: Path) -> dict[str, int]:
    """A file of ``name number`` lines; empty when it cannot be read."""
    table = {}
    for line in read_lines(path):
        name, _, value = line.partition(" ")
        if value.isdigit():
            table[name] = int(value)
    return table


def read_number(path: Path) -> int:
    """A file of one number; ``max`` is the largest unsigned 64-bit number, an unreadable file 0."""
    lines = read_lines(path)
    text = lines[0] if lines else ""
    if text == "max":
        return (1 << 64) - 1
    return int(text) if text.isdigit() else 0


def read_lines(path: Path) -> list[str]:
    """Lines of a file; empty when it cannot be read."""
    try:
        return small_files.read(str(path)).decode().splitlines()
    except OSError:
        return []


def _parse(text: str) -> dict[str, str]:
    """proc(5) cgroup lines as path per controller; the v2 hierarchy has the empty name."""
    paths = {}
    for line in text.splitlines():
        _, names, path = line.split(":", 2)
        for name in names.split(","):
            paths[name] = path
    return paths


def _descend(directory: Path) -> Iterator[Path]:
    yield directory
    try:
        with os.scandir(directory) as entries:
            children = [Path(entry.path) for entry in entries if entry.is_dir()]
    except OSError:
        return
    for child in children:
        yield from _descend(child)


def _pids(path: Path) -> set[int]:
    return {int(line) for line in read_lines(path) if line.isdigit() and line != "0"}


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return
