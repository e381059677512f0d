"""The mounts that make up a container's root file system: done in order, undone in reverse.

The list comes from a snapshotter as types, sources and fstab(5) options; this module turns the
options into flags and data. mount(2) takes one page of data, too little for the lower directories
of an image with many layers: they are then named relative to their common parent, which the process
enters for the length of the call. A shim uses absolute paths everywhere else, so nobody notices.
"""

from __future__ import annotations

import errno
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from services.common import linux
from services.common.errors import FailedPrecondition, InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Sequence

log = structlog.get_logger(__name__)

# One page, less the byte that ends it (mount(2)); the kernel cuts what is longer without a word.
_DATA_MAX_BYTES = 4095
_UNMOUNT_ATTEMPTS = 64
_cwd_lock = threading.Lock()

_SET_FLAGS = {
    "ro": linux.MS_RDONLY,
    "nosuid": linux.MS_NOSUID,
    "nodev": linux.MS_NODEV,
    "noexec": linux.MS_NOEXEC,
    "sync": linux.MS_SYNCHRONOUS,
    "remount": linux.MS_REMOUNT,
    "mand": linux.MS_MANDLOCK,
    "dirsync": linux.MS_DIRSYNC,
    "noatime": linux.MS_NOATIME,
    "nodiratime": linux.MS_NODIRATIME,
    "bind": linux.MS_BIND,
    "rbind": linux.MS_BIND | linux.MS_REC,
    "relatime": linux.MS_RELATIME,
    "strictatime": linux.MS_STRICTATIME,
}
_CLEAR_FLAGS = {
    "rw": linux.MS_RDONLY,
    "suid": linux.MS_NOSUID,
    "dev": linux.MS_NODEV,
    "exec": linux.MS_NOEXEC,
    "async": linux.MS_SYNCHRONOUS,
    "nomand": linux.MS_MANDLOCK,
    "atime": linux.MS_NOATIME,
    "diratime": linux.MS_NODIRATIME,
    "norelatime": linux.MS_RELATIME,
    "nostrictatime": linux.MS_STRICTATIME,
    "defaults": 0,
}
_PROPAGATION_FLAGS = {
    "shared": linux.MS_SHARED,
    "rshared": linux.MS_SHARED | linux.MS_REC,
    "slave": linux.MS_SLAVE,
    "rslave": linux.MS_SLAVE | linux.MS_REC,
    "private": linux.MS_PRIVATE,
    "rprivate": linux.MS_PRIVATE | linux.MS_REC,
    "unbindable": linux.MS_UNBINDABLE,
    "runbindable": linux.MS_UNBINDABLE | linux.MS_REC,
}


@dataclass(frozen=True, slots=True)
class Mount:
    """One mount.

    Attributes:
        type: file system type, or ``bind``.
        source: a device, a directory, or a name.
        target: below the place that the list is mounted at; empty: that place itself.
        options: as in fstab(5).
    """

    type: str
    source: str
    target: str = ""
    options: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class MountArguments:
    """Options split the way mount(2) wants them: the flags, the propagation, the rest as data."""

    flags: int
    propagation: int
    data: tuple[str, ...]


def mount_all(mounts: Sequence[Mount], root: Path) -> None:
    """Mount a list at ``root``; on a failure what was mounted is unmounted again. Blocks.

    Raises:
        FailedPrecondition: the kernel refused one, in its words.
        InvalidArgument: a target is outside of ``root``.
    """
    done: list[Path] = []
    try:
        for mount in mounts:
            target = _target(root, mount.target)
            _mount_one(mount, target)
            done.append(target)
    except (OSError, FailedPrecondition, InvalidArgument) as error:
        for target in reversed(done):
            unmount(target)
        if isinstance(error, OSError):
            raise FailedPrecondition(
                f"cannot mount the root file system: {mount.type} of '{mount.source}' at {root}: "
                f"{error.strerror}"
            ) from error
        raise


def unmount(target: Path) -> None:
    """Unmount everything that is mounted at ``target``; nothing mounted is fine. Blocks.

    Raises:
        FailedPrecondition: something holds it, or the kernel refused.
    """
    for _ in range(_UNMOUNT_ATTEMPTS):
        try:
            linux.umount(target, linux.UMOUNT_NOFOLLOW)
        except OSError as error:
            # EINVAL: not a mount point (any more).
            if error.errno in (errno.EINVAL, errno.ENOENT):
                return
            if error.errno == errno.EBUSY:
                # Somebody looks at it from outside; the mount goes away with the last look.
                log.warning("root file system busy, unmounting lazily", target=str(target))
                linux.umount(target, linux.UMOUNT_NOFOLLOW | linux.MNT_DETACH)
                continue
            raise FailedPrecondition(f"cannot unmount {target}: {error.strerror}") from error
    raise FailedPrecondition(f"cannot unmount {target}: mounts keep appearing there")


def parse_options(options: Sequence[str]) -> MountArguments:
    """Split fstab(5) options into flags, propagation and data; a later option wins."""
    flags = propagation = 0
    data = []
    for option in options:
        if option in _SET_FLAGS:
            flags |= _SET_FLAGS[option]
        elif option in _CLEAR_FLAGS:
            flags &= ~_CLEAR_FLAGS[option]
        elif option in _PROPAGATION_FLAGS:
            propagation = _PROPAGATION_FLAGS[option]
        elif option and option != "loop":
            data.append(option)
    return MountArguments(flags, propagation, tuple(data))


def shorten_lower_directories(data: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """Rewrite the directories of an overlay's options relative to their common parent.

    Returns:
        The directory to enter for the mount, and the options; an empty directory when the lower
        directories have no parent in common.
    """
    lower = next((option for option in data if option.startswith("lowerdir=")), "")
    paths = lower.removeprefix("lowerdir=").split(":")
    if not lower or not all(path.startswith("/") for path in paths):
        return "", tuple(data)
    common = os.path.commonpath([str(Path(path).parent) for path in paths])
    if common == "/":
        return "", tuple(data)
    short = "lowerdir=" + ":".join(os.path.relpath(path, common) for path in paths)
    return common, tuple(short if option is lower else option for option in data)


def _target(root: Path, target: str) -> Path:
    path = Path(os.path.normpath(root / target.lstrip("/"))) if target else root
    if path != root and root not in path.parents:
        raise InvalidArgument(f"mount target '{target}' is outside of the root file system")
    if not path.is_dir():
        path.mkdir(parents=True, exist_ok=True)
    return path


def _mount_one(mount: Mount, target: Path) -> None:
    arguments = parse_options(mount.options)
    flags, data, directory = arguments.flags, ",".join(arguments.data), ""
    fstype = mount.type
    if fstype in ("bind", "rbind"):
        flags |= linux.MS_BIND | (linux.MS_REC if fstype == "rbind" else 0)
        fstype = ""
    if len(data.encode()) > _DATA_MAX_BYTES and fstype == "overlay":
        directory, shortened = shorten_lower_directories(arguments.data)
        data = ",".join(shortened)
    if len(data.encode()) > _DATA_MAX_BYTES:
        raise FailedPrecondition(
            f"cannot mount the root file system: its options take {len(data.encode())} bytes, the "
            f"kernel takes {_DATA_MAX_BYTES}: an image with fewer layers is needed"
        )
    _call(mount.source, target, fstype=fstype, flags=flags, data=data, directory=directory)
    if flags & linux.MS_BIND and flags & ~(linux.MS_BIND | linux.MS_REC):
        # A bind mount takes its other flags only when it is mounted once more (mount(2)).
        linux.mount("", target, flags=(flags & ~linux.MS_REC) | linux.MS_REMOUNT)
    if arguments.propagation:
        linux.mount("", target, flags=arguments.propagation)


def _call(source: str, target: Path, *, fstype: str, flags: int, data: str, directory: str) -> None:
    if not directory:
        linux.mount(source, target, fstype=fstype, flags=flags, data=data)
        return
    with _cwd_lock:
        os.chdir(directory)
        try:
            linux.mount(source, target, fstype=fstype, flags=flags, data=data)
        finally:
            os.chdir("/")
