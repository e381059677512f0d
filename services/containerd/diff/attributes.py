"""Attributes of a layer's files: what is taken from the tar, and what is not."""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING

import structlog

from services.containerd.diff import reader

if TYPE_CHECKING:
    from services.containerd.diff.reader import Entry

log = structlog.get_logger(__name__)

OPAQUE_ATTRIBUTE = "trusted.overlay.opaque"
"""On an upper directory, with value y: the lower ones of that name are not merged into it."""

OVERLAY_ATTRIBUTES = ("trusted.overlay.", "user.overlay.")
"""Beginnings of the attributes that steer overlayfs."""

_KEPT = ("user.", "trusted.", "security.capability")
_HANDLE = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC

SPECIAL_BITS = stat.S_ISUID | stat.S_ISGID | stat.S_ISVTX
_MAX_TIME_NS = (1 << 63) - 1


def set_xattrs(target: int | str, entry: Entry) -> None:
    """Set an entry's extended attributes on a descriptor, or on what a path leads to.

    Raises:
        OSError: the system refuses one; but not if the file system has no such attributes.
    """
    for name, value in entry.xattrs.items():
        if name.startswith(OVERLAY_ATTRIBUTES):
            # overlayfs believes them: they are not for a stranger to write.
            log.warning("attribute of the layer left out", entry=entry.name, attribute=name)
            continue
        try:
            os.setxattr(target, name, value)
        except OSError as error:
            # xattr(7): user attributes are for files and directories only.
            is_other = entry.kind not in (reader.REGULAR, reader.DIRECTORY)
            refused = error.errno == errno.EPERM and name.startswith("user.") and is_other
            if error.errno != errno.ENOTSUP and not refused:
                raise
            log.warning("attribute of the layer left out", entry=entry.name, attribute=name)


def times(entry: Entry) -> tuple[int, int]:
    """Times of access and of change, in nanoseconds; one that cannot be is the epoch."""
    modified = entry.mtime_ns if 0 <= entry.mtime_ns <= _MAX_TIME_NS else 0
    accessed = max(entry.atime_ns, modified)
    return (accessed if accessed <= _MAX_TIME_NS else 0, modified)


def kept_attributes(directory_fd: int, base: str) -> dict[str, bytes]:
    """The extended attributes of an entry that belong into a layer, not those of this machine."""
    handle = os.open(base, _HANDLE, dir_fd=directory_fd)
    try:
        # Through proc(5) a handle stands for the entry itself, a symbolic link included.
        path = f"/proc/self/fd/{handle}"
        return {
            name: os.getxattr(path, name)
            for name in sorted(os.listxattr(path))
            if name.startswith(_KEPT) and not name.startswith(OVERLAY_ATTRIBUTES)
        }
    finally:
        os.close(handle)
