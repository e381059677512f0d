"""A copy of a file tree that cannot be told from it: owners, modes, times, links, holes.

The source does not change meanwhile. Both sides are walked by descriptors, and no symbolic link is
followed. Blocks are shared where the file system can do that (ioctl_ficlonerange(2)). Blocks.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_HANDLE = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_FICLONE = 0x40049409  # linux/fs.h
_NO_CLONE = (errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL)
_PIECE_BYTES = 1 << 30


def copy_tree(source: Path, target: Path) -> None:
    """Copy what is in ``source`` into ``target``, an empty directory that becomes like it.

    Only its owner stays, which may be one that a user namespace's root is mapped to.
    """
    source_fd = os.open(source, _DIRECTORY)
    try:
        target_fd = os.open(target, _DIRECTORY)
        try:
            _Copy(source_fd, target_fd).run()
        finally:
            os.close(target_fd)
    finally:
        os.close(source_fd)


class _Copy:
    def __init__(self, source: int, target: int) -> None:
        self._source = source
        self._target = target
        self._clones = True
        self._linked: dict[tuple[int, int], str] = {}  # the first name of files that have several

    def run(self) -> None:
        """Copy all entries, then give directories their looks, which files in them would change."""
        pending, directories = [""], []
        while pending:
            name = pending.pop()
            directories.append(name)
            with _both(self._source, self._target, name or ".", _DIRECTORY) as (old, new):
                pending += self._entries(old, new, f"{name}/" if name else "")
        for name in reversed(directories):
            with _both(self._source, self._target, name or ".", _DIRECTORY) as (old, new):
                status = os.fstat(old)
                if name:
                    os.fchown(new, status.st_uid, status.st_gid)
                _copy_attributes(old, new)
                os.fchmod(new, stat.S_IMODE(status.st_mode))
                os.utime(new, ns=(status.st_atime_ns, status.st_mtime_ns))

    def _entries(self, source: int, target: int, prefix: str) -> list[str]:
        """Copy the entries of a directory; returns the directories among them, made and empty."""
        with os.scandir(source) as found:
            names = [entry.name for entry in found]
        directories = []
        for name in names:
            status = os.stat(name, dir_fd=source, follow_symlinks=False)
            inode = (status.st_dev, status.st_ino)
            if stat.S_ISDIR(status.st_mode):
                os.mkdir(name, 0o700, dir_fd=target)
                directories.append(prefix + name)
            elif inode in self._linked:
                first = self._linked[inode]
                os.link(
                    first, name, src_dir_fd=self._target, dst_dir_fd=target, follow_symlinks=False
                )
            else:
                self._make(source, target, name, status)
                if status.st_nlink > 1:
                    self._linked[inode] = prefix + name
        return directories

    def _make(self, source: int, target: int, name: str, status: os.stat_result) -> None:
        if stat.S_ISREG(status.st_mode):
            self._file(source, target, name, status.st_size)
        elif stat.S_ISLNK(status.st_mode):
            os.symlink(os.readlink(name, dir_fd=source), name, dir_fd=target)
        else:
            os.mknod(name, status.st_mode, status.st_rdev, dir_fd=target)
        os.chown(name, status.st_uid, status.st_gid, dir_fd=target, follow_symlinks=False)
        with _both(source, target, name, _HANDLE) as (old, new):
            # Through proc(5) a handle stands for the entry itself, a symbolic link included.
            _copy_attributes(f"/proc/self/fd/{old}", f"/proc/self/fd/{new}")
            if not stat.S_ISLNK(status.st_mode):
                Path(f"/proc/self/fd/{new}").chmod(stat.S_IMODE(status.st_mode))
        times = (status.st_atime_ns, status.st_mtime_ns)
        os.utime(name, ns=times, dir_fd=target, follow_symlinks=False)

    def _file(self, source: int, target: int, name: str, size_bytes: int) -> None:
        os.close(os.open(name, _NEW, 0o600, dir_fd=target))
        if size_bytes:
            with _both(source, target, name, _FILE) as (old, new):
                if not self._clone(old, new):
                    _copy_data(old, new, size_bytes)

    def _clone(self, source: int, target: int) -> bool:
        if self._clones:
            try:
                fcntl.ioctl(target, _FICLONE, source)
            except OSError as error:
                if error.errno not in _NO_CLONE:
                    raise
                self._clones = False
        return self._clones


def _copy_data(source: int, target: int, size_bytes: int) -> None:
    """Copy what is written, and leave holes where the source has them."""
    offset = 0
    while offset < size_bytes:
        try:
            begin = os.lseek(source, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:  # lseek(2): nothing but a hole up to the end
                raise
            break
        end = os.lseek(source, begin, os.SEEK_HOLE)
        while begin < end:
            copied = os.copy_file_range(
                source, target, min(end - begin, _PIECE_BYTES), begin, begin
            )
            if copied == 0:
                raise OSError(errno.EIO, "a file ended while it was copied")
            begin += copied
        offset = end
    os.ftruncate(target, size_bytes)


def _copy_attributes(source: int | str, target: int | str) -> None:
    for name in os.listxattr(source):
        os.setxattr(target, name, os.getxattr(source, name))


@contextlib.contextmanager
def _both(source: int, target: int, name: str, flags: int) -> Iterator[tuple[int, int]]:
    """One name opened in both trees."""
    old = os.open(name, flags, dir_fd=source)
    try:
        new = os.open(name, flags, dir_fd=target)
        try:
            yield old, new
        finally:
            os.close(new)
    finally:
        os.close(old)
