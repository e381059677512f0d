"""Where the engines stand: private mounts of a sandbox, gone with its mount namespace.

    /run                    an empty tmpfs
      bench/<name>/root     a fresh ext4 in a file that has no name any more, one per engine
      bench/<name>/...      sockets and state
    /etc /root /var/lib     writable copies, for those who write where they were not told to

A loop device frees itself when it is unmounted, so that even SIGKILL leaves nothing.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

from services.common import linux
from tools.sandbox import MARK

_DIRECTORY = Path("/run/bench")
_COPIES = (Path("/etc"), Path("/root"), Path("/var/lib"))
_DISK_BYTES = 4 << 30
_FLUSHES_FIELD = 15
"""Of /sys/block/*/stat (Documentation/block/stat.rst), counted from 0."""


class Stage:
    """Directories for engines below ``directory``."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def place(self, name: str) -> Path:
        """A directory for an engine; ``root`` in it is a file system of its own."""
        place = self.directory / name
        root = place / "root"
        root.mkdir(parents=True)
        with tempfile.NamedTemporaryFile(prefix=".theseus-bench-", dir="/tmp") as image:
            os.truncate(image.fileno(), _DISK_BYTES)
            # What is left for later by default would be written while something is measured.
            lazy = "lazy_itable_init=0,lazy_journal_init=0"
            subprocess.run(["mkfs.ext4", "-q", "-F", "-E", lazy, image.name], check=True)
            subprocess.run(["mount", "-o", "loop", image.name, str(root)], check=True)
        return place


def build() -> Stage:
    """Set the stage.

    Raises:
        RuntimeError: this is not a sandbox.
    """
    if MARK not in os.environ:
        raise RuntimeError("the bench changes mounts and networks: use make bench")
    linux.mount("tmpfs", _DIRECTORY.parent, fstype="tmpfs", data="mode=755")
    _DIRECTORY.mkdir()
    for original in _COPIES:
        _copy(original, _DIRECTORY / "copies" / original.name)
    return Stage(_DIRECTORY)


def flushes(path: Path) -> int:
    """How often the disk below ``path`` was told to make durable what it had been given."""
    device = path.stat().st_dev
    statistics = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/stat").read_text()
    return int(statistics.split()[_FLUSHES_FIELD])


def used_bytes(path: Path) -> int:
    """What is in use of the file system that ``path`` lies on."""
    facts = os.statvfs(path)
    return (facts.f_blocks - facts.f_bfree) * facts.f_frsize


def _copy(original: Path, changes: Path) -> None:
    upper, work = changes / "upper", changes / "work"
    upper.mkdir(parents=True)
    work.mkdir()
    options = f"lowerdir={original},upperdir={upper},workdir={work}"
    linux.mount("overlay", original, fstype="overlay", data=options)
