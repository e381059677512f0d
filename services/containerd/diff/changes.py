"""What differs between two states of a file tree, in an order that is always the same.

Two ways to find out. An overlay keeps its changes in a directory of their own, which only has to
be read; any other pair of trees is walked side by side. Both go by descriptors and follow no
symbolic link, since a container may be at work in the tree meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import stat
from typing import TYPE_CHECKING

from services.common.frozen import frozen
from services.containerd.diff.attributes import OPAQUE_ATTRIBUTE, kept_attributes

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
# overlayfs.rst: content that lies in another layer, or below another name
_ELSEWHERE = ("trusted.overlay.redirect", "trusted.overlay.metacopy")
_COMPARED_BYTES = 1 << 18


class NotSelfContained(Exception):
    """The upper directory refers to the layers below it: it cannot be read by itself."""


@frozen
class Change:
    """An entry that was made or changed, or has gone.

    Attributes:
        name: its path from the root of the tree.
        directory_fd: the directory that it is in, open until the next change is asked for.
        status: what it is; None if it has gone.
        opaque: of a directory, that nothing of what it had before is left.
    """

    name: str
    directory_fd: int
    status: os.stat_result | None
    opaque: bool = False

    @property
    def base(self) -> str:
        """The last component of the name."""
        return self.name.rpartition("/")[2]


def of_upper(upper: Path) -> Iterator[Change]:
    """The changes that an overlay's upper directory holds, parents first.

    Raises:
        NotSelfContained: they have to be found otherwise.
    """
    with _opened(upper) as fd:
        yield from _of_upper(fd, "")


def between(lower: Path, upper: Path) -> Iterator[Change]:
    """The changes that make ``upper``'s tree of ``lower``'s, parents first.

    Directories on the way to a change are among them, changed or not.
    """
    with _opened(lower) as lower_fd, _opened(upper) as upper_fd:
        yield from _between(lower_fd, upper_fd, "", [])


def _of_upper(fd: int, prefix: str) -> Iterator[Change]:
    for base in _names(fd):
        name = prefix + base
        found = _status(fd, base)
        if found is None:
            continue
        if stat.S_ISCHR(found.st_mode) and found.st_rdev == 0:
            yield Change(name, fd, None)
        elif stat.S_ISDIR(found.st_mode):
            with _entered(fd, base) as child:
                yield Change(name, fd, found, opaque=_is_opaque(child))
                yield from _of_upper(child, f"{name}/")
        else:
            if stat.S_ISREG(found.st_mode):
                file = os.open(base, _FILE, dir_fd=fd)
                try:
                    _is_opaque(file)
                finally:
                    os.close(file)
            yield Change(name, fd, found)


def _between(lower: int | None, upper: int, prefix: str, parents: list[Change]) -> Iterator[Change]:
    """``parents`` are the unchanged directories above that have not been given yet."""
    before = set(_names(lower)) if lower is not None else set()
    for base in sorted(before.union(_names(upper)), key=os.fsencode):
        old = _status(lower, base) if lower is not None and base in before else None
        new = _status(upper, base)
        change = Change(prefix + base, upper, new)
        if new is None:
            if old is not None:
                yield from _after(parents, change)
            continue
        if not stat.S_ISDIR(new.st_mode):
            if old is None or lower is None or not _same(lower, old, upper, new, base):
                yield from _after(parents, change)
            continue
        was_directory = old is not None and stat.S_ISDIR(old.st_mode)
        waiting = [*parents, change]
        if (
            old is None
            or lower is None
            or not was_directory
            or not _alike(old, new)
            or kept_attributes(lower, base) != kept_attributes(upper, base)
        ):
            yield from _after(parents, change)
            waiting = []
        with _entered(upper, base) as child, contextlib.ExitStack() as stack:
            child_before = None
            if lower is not None and was_directory:
                child_before = stack.enter_context(_entered(lower, base))
            for found in _between(child_before, child, f"{prefix}{base}/", waiting):
                if waiting == []:
                    parents.clear()
                yield found


def _after(parents: list[Change], change: Change) -> Iterator[Change]:
    waiting = parents.copy()
    parents.clear()
    yield from waiting
    yield change


def _same(lower: int, old: os.stat_result, upper: int, new: os.stat_result, base: str) -> bool:
    if not _alike(old, new) or old.st_size != new.st_size:
        return False
    if (old.st_ino, old.st_ctime_ns) == (new.st_ino, new.st_ctime_ns):
        return True  # the file of a layer that is below both
    if kept_attributes(lower, base) != kept_attributes(upper, base):
        return False
    if stat.S_ISLNK(new.st_mode):
        return os.readlink(base, dir_fd=lower) == os.readlink(base, dir_fd=upper)
    if not stat.S_ISREG(new.st_mode):
        return True
    if old.st_mtime_ns != new.st_mtime_ns:
        return False
    # Times that came out of a tar have whole seconds, in which much can happen.
    return bool(new.st_mtime_ns % 1_000_000_000) or _same_content(lower, upper, base)


def _alike(old: os.stat_result, new: os.stat_result) -> bool:
    return (old.st_mode, old.st_uid, old.st_gid, old.st_rdev) == (
        new.st_mode,
        new.st_uid,
        new.st_gid,
        new.st_rdev,
    )


def _same_content(lower: int, upper: int, base: str) -> bool:
    old = os.open(base, _FILE, dir_fd=lower)
    try:
        new = os.open(base, _FILE, dir_fd=upper)
        try:
            while True:
                piece = os.read(old, _COMPARED_BYTES)
                if piece != os.read(new, _COMPARED_BYTES):
                    return False
                if not piece:
                    return True
        finally:
            os.close(new)
    finally:
        os.close(old)


def _is_opaque(fd: int) -> bool:
    """Whether the attributes of an upper directory's entry say so; they must not say more."""
    names = os.listxattr(fd)
    if any(name in _ELSEWHERE for name in names):
        raise NotSelfContained
    return OPAQUE_ATTRIBUTE in names and os.getxattr(fd, OPAQUE_ATTRIBUTE) == b"y"


def _names(fd: int) -> list[str]:
    with os.scandir(fd) as entries:
        return sorted((entry.name for entry in entries), key=os.fsencode)


def _status(fd: int, base: str) -> os.stat_result | None:
    with contextlib.suppress(FileNotFoundError):
        return os.stat(base, dir_fd=fd, follow_symlinks=False)
    return None


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def _entered(parent: int, base: str) -> Iterator[int]:
    fd = os.open(base, _DIRECTORY, dir_fd=parent)
    try:
        yield fd
    finally:
        os.close(fd)
