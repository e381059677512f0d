"""The cgroup of shims: ``theseus/shims`` in every v1 hierarchy, or in the v2 one.

Who stops containerd's cgroup must not stop the shims. The factory enters theirs once, at its start,
and every shim is born there: moving a process costs the kernel milliseconds, being forked nothing.
What cannot be entered is left out: a shim works anywhere. Who leaves last removes it: the keeper
where there is one, since it goes on as long as any container does.
"""

from __future__ import annotations

import contextlib
import errno
import time
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
PATH = "theseus/shims"
KEEPER_NAME = "theseus-keeper"
"""The keeper's name as the kernel shows it."""
_ENTER_ATTEMPTS = 10
_JUST_REMOVED = (errno.ENOENT, errno.ENODEV, errno.EEXIST)
"""What making and entering it fail with when somebody else leaves, and removes it, meanwhile."""
_LEAVE_ATTEMPTS = 20
_LEAVE_PAUSE_S = 0.05
_CPUSET_FILES = ("cpuset.cpus", "cpuset.mems")


class Home:
    """The cgroups that this process came from, and the way there and back.

    Attributes:
        skipped: cgroups that could not be entered, with the reason. Not logged here: the keeper has
            no logger.
    """

    def __init__(self, root: Path = ROOT, proc: Path = Path("/proc/self/cgroup")) -> None:
        self._root = root
        self._proc = proc
        self._left: list[tuple[Path, Path]] = []
        self.skipped: dict[str, str] = {}

    def enter(self) -> None:
        """Move this process into the shims' cgroup wherever that can be done."""
        for line in self._proc.read_text().splitlines():
            _, names, path = line.split(":", 2)
            hierarchy = self._hierarchy(names)
            shims = hierarchy / PATH
            origin = hierarchy / path.lstrip("/")
            if not hierarchy.is_dir() or origin == shims:
                continue
            try:
                _enter(shims)
            except OSError as error:
                self.skipped[str(shims)] = error.strerror or ""
                continue
            self._left.append((origin, shims))

    def leave(self) -> None:
        """Move back, and remove the shims' cgroup where no shim is left. Blocks, about a second.

        Shims that were told to end may take a moment for it; those that go on keep the cgroup. It
        is not waited for, and left to the keeper, while that is there.
        """
        for origin, _ in self._left:
            with contextlib.suppress(OSError):
                (origin / "cgroup.procs").write_text("0")
        waiting = [shims for _, shims in self._left]
        for _ in range(_LEAVE_ATTEMPTS):
            waiting = [shims for shims in waiting if not _remove(shims)]
            if not waiting or _has_keeper(waiting[0]):
                break
            time.sleep(_LEAVE_PAUSE_S)
        self._left.clear()

    def _hierarchy(self, names: str) -> Path:
        if names:
            return self._root / names.partition(",")[0].removeprefix("name=")
        pure = (self._root / "cgroup.controllers").exists()
        return self._root if pure else self._root / "unified"


def _enter(shims: Path) -> None:
    """Move this process there; what cannot be entered is not left behind."""
    for attempt in range(1, _ENTER_ATTEMPTS + 1):
        try:
            _make(shims)
            (shims / "cgroup.procs").write_text("0")
            return
        except OSError as error:
            _remove(shims)
            if error.errno not in _JUST_REMOVED or attempt == _ENTER_ATTEMPTS:
                raise


def _make(directory: Path) -> None:
    """Make a cgroup; in a cpuset hierarchy it takes no process before it has CPUs and nodes."""
    for path in (directory.parent, directory):
        path.mkdir(exist_ok=True)
        for name in _CPUSET_FILES:
            file = path / name
            if file.exists() and not file.read_text().strip():
                file.write_text((path.parent / name).read_text())


def _remove(shims: Path) -> bool:
    try:
        shims.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    with contextlib.suppress(OSError):
        shims.parent.rmdir()
    return True


def _has_keeper(shims: Path) -> bool:
    with contextlib.suppress(OSError):
        for pid in (shims / "cgroup.procs").read_text().split():
            with contextlib.suppress(OSError):  # it has ended
                if Path(f"/proc/{pid}/comm").read_text().strip() == KEEPER_NAME:
                    return True
    return False
