"""Where the engines stand: private mounts of a sandbox, gone with its mount namespace.

    <directory>/            tmpfs; all that follows lies in it
      <name>/root           a fresh ext4 in a file that has no name any more, one per engine
      <name>/...            sockets and state, as on the tmpfs that /run is elsewhere
    /run                    an empty tmpfs
    /etc /root /var/lib     writable copies, for those who write where they were not told to

A loop device frees itself when it is unmounted, so that even SIGKILL leaves no more than an empty
directory.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from services.common import linux
from tools.sandbox import MARK

if TYPE_CHECKING:
    from collections.abc import Iterator

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


@contextmanager
def built() -> Iterator[Stage]:
    """Set the stage.

    Raises:
        RuntimeError: this is not a sandbox.
    """
    if MARK not in os.environ:
        raise RuntimeError("the bench changes mounts and networks: use make bench")
    directory = Path(tempfile.mkdtemp(prefix="theseus-bench-", dir="/tmp"))
    try:
        linux.mount("tmpfs", directory, fstype="tmpfs", data="mode=755")
        for original in _COPIES:
            _copy(original, directory / "copies" / original.name)
        linux.mount("tmpfs", "/run", fstype="tmpfs", data="mode=755")
        yield Stage(directory)
    finally:
        linux.umount(directory, linux.MNT_DETACH)
        directory.rmdir()


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
