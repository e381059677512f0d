"""The file trees of snapshots: made, measured, brought to the disk, removed. All functions block.

<root>/snapshots/<snapshotter>/<id>/fs      what the snapshot holds
                                   /work    overlayfs' scratch space (active snapshots only)
                              /rm-<id>...   removed, on its way out
"""

from __future__ import annotations

import os
import secrets
import shutil
import stat
from typing import TYPE_CHECKING

from services.common import linux
from services.containerd.snapshots.snapshotter import Usage

if TYPE_CHECKING:
    from pathlib import Path

_BLOCK_BYTES = 512  # the unit of st_blocks, whatever the file system's: stat(3type)
_RUBBISH = "rm-"


def make(directory: Path, *, like: Path | None, owner: tuple[int, int] | None, work: bool) -> None:
    """Make a snapshot's directory.

    Args:
        directory: which does not exist yet.
        like: a tree whose root's mode and owner the new one gets; None: 0755, root's.
        owner: uid and gid to have instead of ``like``'s.
        work: whether the snapshot can be written.
    """
    directory.mkdir(mode=0o700)
    files = directory / "fs"
    files.mkdir()
    mode = 0o755
    if like is not None:
        status = like.stat()
        mode = stat.S_IMODE(status.st_mode)
        owner = owner or (status.st_uid, status.st_gid)
    if owner is not None and owner != (os.geteuid(), os.getegid()):
        os.chown(files, *owner)
    files.chmod(mode)
    if work:
        (directory / "work").mkdir(mode=0o711)


def measure(directory: Path) -> Usage:
    """What a tree takes on the disk. What vanishes meanwhile does not count."""
    usage = _Measure()
    usage.add(directory.lstat())
    pending = [directory.as_posix()]
    while pending:
        try:
            entries = os.scandir(pending.pop())
        except FileNotFoundError:
            continue
        with entries:
            for entry in entries:
                try:
                    usage.add(entry.stat(follow_symlinks=False))
                except FileNotFoundError:
                    continue
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)
    return Usage(usage.inodes, usage.size_bytes)


def sync(directory: Path) -> None:
    """Bring the file system that a tree lies on to the disk."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        linux.syncfs(fd)
    finally:
        os.close(fd)


def put_aside(directory: Path) -> Path | None:
    """Rename a directory so that it is rubbish for all to see; None if it is not there."""
    # No new directory to rename it over: on a full disk there is no room for one.
    place = directory.with_name(f"{_RUBBISH}{directory.name}-{secrets.token_hex(4)}")
    try:
        return directory.rename(place)
    except FileNotFoundError:
        return None


def remove(directory: Path) -> None:
    """Remove a tree; it is no failure if somebody else does the same, or has done."""
    shutil.rmtree(directory, onerror=_unless_gone)


def _unless_gone(_function: object, _path: str, info: tuple[object, object, object]) -> None:
    error = info[1]
    if isinstance(error, BaseException) and not isinstance(error, FileNotFoundError):
        raise error


class _Measure:
    def __init__(self) -> None:
        self.inodes = 0
        self.size_bytes = 0
        self._linked: set[tuple[int, int]] = set()

    def add(self, status: os.stat_result) -> None:
        if status.st_nlink > 1 and not stat.S_ISDIR(status.st_mode):
            inode = (status.st_dev, status.st_ino)
            if inode in self._linked:
                return
            self._linked.add(inode)
        self.inodes += 1
        self.size_bytes += status.st_blocks * _BLOCK_BYTES
