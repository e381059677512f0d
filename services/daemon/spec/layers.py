"""Reading single files of a root file system that is not mounted, out of its overlay layers.

The shim mounts a container's root at Task.Create; before that the daemon needs ``/etc/passwd`` and
``/etc/group``. :class:`LayeredRoot` finds a file as overlayfs would: the topmost layer wins,
directories of the same path are merged, whiteouts and opaque directories hide what is below.

Every step opens one component with ``O_NOFOLLOW`` below a directory that is already open, and
symlinks are walked by hand from the container's root: nothing in an image leads outside of it.
"""

from __future__ import annotations

import os
import stat
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from services.common.errors import FailedPrecondition, ResourceExhausted

if TYPE_CHECKING:
    from collections.abc import Sequence

_SYMLINKS_MAX = 40  # as the kernel, path_resolution(7)
_OPAQUE_ATTRIBUTES = ("trusted.overlay.opaque", "user.overlay.opaque")

_Directories = tuple[int, ...]


def layers_of_mount(*, fstype: str, source: str, options: Sequence[str]) -> tuple[Path, ...]:
    """The directories behind a root mount as containerd's snapshots describe it, topmost first.

    Raises:
        FailedPrecondition: neither an overlay nor a bind mount.
    """
    if fstype in ("bind", "rbind", "none") or "bind" in options or "rbind" in options:
        return (Path(source),)
    if fstype != "overlay":
        raise FailedPrecondition(f"cannot read files below a root of type '{fstype}'")
    values = dict(option.split("=", 1) for option in options if "=" in option)
    upper = [values["upperdir"]] if "upperdir" in values else []
    return tuple(Path(path) for path in [*upper, *_split_lower(values.get("lowerdir", ""))])


class LayeredRoot:
    """A root made of layers, topmost first; a single directory is a root with one layer."""

    def __init__(self, layers: Sequence[Path]) -> None:
        self._layers = tuple(layers)

    def read(self, path: str, *, size_max: int) -> bytes | None:
        """The content of a regular file; None when there is none at ``path``. Blocks.

        Raises:
            ResourceExhausted: the file has more than ``size_max`` bytes.
        """
        with ExitStack() as stack:
            fd = self._find(path, stack)
            if fd is None or not stat.S_ISREG(os.fstat(fd).st_mode):
                return None
            # An O_PATH descriptor cannot be read: open the same inode anew.
            with Path(f"/proc/self/fd/{fd}").open("rb") as file:
                data = file.read(size_max + 1)
        if len(data) > size_max:
            raise ResourceExhausted(f"{path} in the image has more than {size_max} bytes")
        return data

    def _find(self, path: str, stack: ExitStack) -> int | None:
        """An O_PATH descriptor of what ``path`` leads to; the stack closes everything opened."""
        root = tuple(
            _keep(stack, os.open(layer, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
            for layer in self._layers
        )
        trail: list[_Directories] = [root]
        waiting = _components(path)
        symlinks = 0
        while waiting:
            name = waiting.pop(0)
            if name == "..":
                trail = trail[:-1] or [root]
                continue
            found = _lookup(trail[-1], name, stack)
            if not found:
                return None
            mode = os.fstat(found[0]).st_mode
            if stat.S_ISLNK(mode):
                symlinks += 1
                if symlinks > _SYMLINKS_MAX:
                    return None
                target = os.readlink("", dir_fd=found[0])
                if target.startswith("/"):
                    trail = [root]
                waiting = _components(target) + waiting
            elif stat.S_ISDIR(mode):
                trail.append(found)
            else:
                return None if waiting else found[0]
        return trail[-1][0] if trail[-1] else None


def _lookup(directories: _Directories, name: str, stack: ExitStack) -> _Directories:
    """Descriptors of ``name`` in merged directories: one, or several when they are directories."""
    found: list[int] = []
    for directory in directories:
        try:
            fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
        except (FileNotFoundError, NotADirectoryError):
            continue
        _keep(stack, fd)
        status = os.fstat(fd)
        if stat.S_ISCHR(status.st_mode) and status.st_rdev == 0:  # a whiteout
            break
        if not stat.S_ISDIR(status.st_mode):
            if not found:
                found.append(fd)
            break
        found.append(fd)
        if _opaque(fd):
            break
    return tuple(found)


def _opaque(fd: int) -> bool:
    for attribute in _OPAQUE_ATTRIBUTES:
        try:
            if os.getxattr(f"/proc/self/fd/{fd}", attribute) == b"y":
                return True
        except OSError:
            continue
    return False


def _components(path: str) -> list[str]:
    return [name for name in path.split("/") if name not in ("", ".")]


def _split_lower(text: str) -> list[str]:
    """Split overlayfs' colon-separated list, in which a backslash escapes a colon."""
    paths = [""]
    escaped = False
    for character in text:
        if escaped or character not in "\\:":
            paths[-1] += character
            escaped = False
        elif character == "\\":
            escaped = True
        else:
            paths.append("")
    return [path for path in paths if path]


def _keep(stack: ExitStack, fd: int) -> int:
    stack.callback(os.close, fd)
    return fd
