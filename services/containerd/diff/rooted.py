"""Directories below one root, found as a process would whose ``/`` that root is.

Names come from strangers. openat2(2) with ``RESOLVE_IN_ROOT`` keeps ``..``, absolute names and
symbolic links inside; only the last component of a name is used with a directory's descriptor, and
never followed. Descriptors are kept, because a layer goes directory by directory.
"""

from __future__ import annotations

import contextlib
import os
import posixpath
import shutil
import stat
from typing import TYPE_CHECKING

from services.common import linux
from services.common.frozen import frozen

if TYPE_CHECKING:
    from pathlib import Path

_KEPT = 256
_OPEN = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_RESOLVE = linux.RESOLVE_IN_ROOT | linux.RESOLVE_NO_MAGICLINKS
_DEFAULT_ACL = "system.posix_acl_default"


@frozen
class Directory:
    """An open directory.

    Attributes:
        fd: its descriptor.
        passes_on: whether new files get a group or an access list from it (a set-group-ID bit, a
            default ACL), so that owner and mode have to be set on them in any case.
    """

    fd: int
    passes_on: bool


class RootedTree:
    """The directories below ``root``, by names relative to it; ``""`` is the root itself.

    Names are as ``clean`` gives them. Close it; what it gave is closed then.
    """

    def __init__(self, root: Path) -> None:
        self.root = _directory(os.open(root, _OPEN))
        self._kept: dict[str, Directory] = {"": self.root}
        self._retired: list[int] = []

    def close(self) -> None:
        """Close all descriptors."""
        self._forget()
        self.release()
        os.close(self.root.fd)

    def release(self) -> None:
        """Close what is not kept any more. What was given before may be closed then."""
        while self._retired:
            os.close(self._retired.pop())

    def directory(self, name: str) -> Directory:
        """An open directory, good until ``release``.

        Raises:
            OSError: there is none: ENOENT, ENOTDIR, ELOOP.
        """
        kept = self._kept.get(name)
        if kept is not None:
            return kept
        fd = linux.openat2(name, _OPEN, dir_fd=self.root.fd, resolve=_RESOLVE)
        return self._keep(name, fd)

    def enter(self, name: str, parent: Directory, base: str) -> Directory:
        """The directory ``base`` in ``parent``, which is there, good until ``release``."""
        return self._keep(name, os.open(base, _OPEN | os.O_NOFOLLOW, dir_fd=parent.fd))

    def refresh(self, name: str) -> None:
        """Look again at what a directory passes on, after a change of its mode or its ACL."""
        if name in self._kept:
            self._kept[name] = _directory(self._kept[name].fd)

    def remove(self, parent: Directory, base: str, mode: int) -> None:
        """Remove an entry of a directory, with all below it, given its ``st_mode``."""
        if stat.S_ISDIR(mode):
            shutil.rmtree(base, dir_fd=parent.fd)
        else:
            os.unlink(base, dir_fd=parent.fd)
        if stat.S_ISDIR(mode) or stat.S_ISLNK(mode):
            self._forget()  # a name that led through it leads elsewhere now

    def _forget(self) -> None:
        self._retired += [directory.fd for name, directory in self._kept.items() if name]
        self._kept = {"": self.root}

    def _keep(self, name: str, fd: int) -> Directory:
        if len(self._kept) >= _KEPT:
            oldest = next(other for other in self._kept if other)
            self._retired.append(self._kept.pop(oldest).fd)
        directory = _directory(fd)
        previous = self._kept.pop(name, None)
        if previous is not None:
            self._retired.append(previous.fd)
        self._kept[name] = directory
        return directory


def clean(name: str) -> str:
    """A name without ``.``, ``..``, empty components and slashes at its ends; ``""`` is the root.

    ``..`` takes a component away as text, and stops at the root (as Go's ``filepath.Clean`` does,
    which the makers of layers rely on).
    """
    if name.startswith("./"):
        name = name[2:]
    name = name.strip("/")
    if "//" in name or "./" in name or name.endswith("."):
        name = posixpath.normpath("/" + name).lstrip("/")
    return name


def status(directory: Directory, base: str) -> os.stat_result | None:
    """What an entry of a directory is, not followed; None if it is not there."""
    with contextlib.suppress(FileNotFoundError):
        return os.stat(base, dir_fd=directory.fd, follow_symlinks=False)
    return None


def _directory(fd: int) -> Directory:
    inherited = os.fstat(fd).st_mode & stat.S_ISGID or _DEFAULT_ACL in os.listxattr(fd)
    return Directory(fd, bool(inherited))
