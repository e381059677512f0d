"""Mounts as data, and the doing of them.

A list of :class:`Mount` is how a snapshotter hands out a file system without mounting it: the
list is done in order and undone in reverse, by whoever wants to see the files. All functions
block.

An overlay is mounted through fsopen(2), which takes the lower directories one by one: mount(2) has
a page for all options, which some thirty layers fill. Where the kernel is too old for that (before
6.7), mount(2) does it.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from services.common import linux
from services.common.errors import FailedPrecondition, Internal, InvalidArgument, Unimplemented

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

log = structlog.get_logger(__name__)

# mount(8), FILESYSTEM-INDEPENDENT MOUNT OPTIONS: what each sets, or clears if the second is True
_FLAGS = {
    "async": (linux.MS_SYNCHRONOUS, True),
    "atime": (linux.MS_NOATIME, True),
    "bind": (linux.MS_BIND, False),
    "defaults": (0, False),
    "dev": (linux.MS_NODEV, True),
    "diratime": (linux.MS_NODIRATIME, True),
    "dirsync": (linux.MS_DIRSYNC, False),
    "exec": (linux.MS_NOEXEC, True),
    "mand": (linux.MS_MANDLOCK, False),
    "noatime": (linux.MS_NOATIME, False),
    "nodev": (linux.MS_NODEV, False),
    "nodiratime": (linux.MS_NODIRATIME, False),
    "noexec": (linux.MS_NOEXEC, False),
    "nomand": (linux.MS_MANDLOCK, True),
    "norelatime": (linux.MS_RELATIME, True),
    "nostrictatime": (linux.MS_STRICTATIME, True),
    "nosuid": (linux.MS_NOSUID, False),
    "private": (linux.MS_PRIVATE, False),
    "rbind": (linux.MS_BIND | linux.MS_REC, False),
    "relatime": (linux.MS_RELATIME, False),
    "remount": (linux.MS_REMOUNT, False),
    "ro": (linux.MS_RDONLY, False),
    "rprivate": (linux.MS_PRIVATE | linux.MS_REC, False),
    "rshared": (linux.MS_SHARED | linux.MS_REC, False),
    "rslave": (linux.MS_SLAVE | linux.MS_REC, False),
    "rw": (linux.MS_RDONLY, True),
    "shared": (linux.MS_SHARED, False),
    "slave": (linux.MS_SLAVE, False),
    "strictatime": (linux.MS_STRICTATIME, False),
    "suid": (linux.MS_NOSUID, True),
    "sync": (linux.MS_SYNCHRONOUS, False),
}
_PROPAGATION = linux.MS_SHARED | linux.MS_PRIVATE | linux.MS_SLAVE | linux.MS_UNBINDABLE
_ATTRIBUTES = {
    linux.MS_RDONLY: linux.MOUNT_ATTR_RDONLY,
    linux.MS_NOSUID: linux.MOUNT_ATTR_NOSUID,
    linux.MS_NODEV: linux.MOUNT_ATTR_NODEV,
    linux.MS_NOEXEC: linux.MOUNT_ATTR_NOEXEC,
    linux.MS_NOATIME: linux.MOUNT_ATTR_NOATIME,
    linux.MS_STRICTATIME: linux.MOUNT_ATTR_STRICTATIME,
    linux.MS_NODIRATIME: linux.MOUNT_ATTR_NODIRATIME,
}
_NOT_HERE = ("loop", "uidmap=", "gidmap=", "X-containerd.")


class MountFailed(Internal):
    """The kernel refused a mount; the message has its reason."""


@dataclass(frozen=True, slots=True)
class Mount:
    """One mount, shaped like the arguments of mount(2).

    Attributes:
        type: file system type, or ``bind``.
        source: a device, a directory, or a plain name, as the type wants it.
        target: where, below the place that the list is mounted at; empty: that place itself.
        options: as in fstab(5): ``ro``, ``rbind``, ``lowerdir=/a:/b``.
    """

    type: str
    source: str
    target: str = ""
    options: tuple[str, ...] = ()


def parse_options(options: Sequence[str]) -> tuple[int, list[str]]:
    """Split options into the flags of mount(2) and those meant for the file system."""
    flags = 0
    data = []
    for option in options:
        if option.startswith(_NOT_HERE):
            raise Unimplemented(f"mount option {option!r} is not supported here")
        if option not in _FLAGS:
            data.append(option)
            continue
        flag, clears = _FLAGS[option]
        flags = flags & ~flag if clears else flags | flag
    return flags, data


def mount_all(mounts: Sequence[Mount], target: Path) -> None:
    """Do a list of mounts at ``target``, a directory that exists; all of them, or none.

    Raises:
        InvalidArgument: the list is empty, or an option makes no sense.
        FailedPrecondition: a source or a target does not exist.
        MountFailed: the kernel refused.
    """
    if not mounts:
        raise InvalidArgument("there is nothing to mount: the list of mounts is empty")
    done: list[Path] = []
    try:
        for mount in mounts:
            place = _resolve(target, mount.target)
            _mount_one(mount, place)
            done.append(place)
    except BaseException:
        _undo(done)
        raise


def unmount_all(mounts: Sequence[Mount], target: Path, flags: int = 0) -> None:
    """Undo ``mount_all``, last first. What is not mounted any more is passed over.

    Raises:
        FailedPrecondition: something is still in use, and ``flags`` lack ``MNT_DETACH``.
    """
    for mount in reversed(mounts):
        place = _resolve(target, mount.target)
        try:
            linux.umount(place, flags | linux.UMOUNT_NOFOLLOW)
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise FailedPrecondition(f"{place} is still in use, and stays mounted") from error
            if error.errno not in (errno.EINVAL, errno.ENOENT):
                raise MountFailed(f"cannot unmount {place}: {error.strerror}") from error


@contextlib.contextmanager
def temporary_mount(
    mounts: Sequence[Mount], directory: Path, *, readonly: bool = False
) -> Iterator[Path]:
    """Mount at a new place below ``directory`` while the context lasts; gives that place."""
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    place = Path(tempfile.mkdtemp(prefix="mount-", dir=directory))
    wanted = [as_readonly(mount) for mount in mounts] if readonly else list(mounts)
    try:
        mount_all(wanted, place)
        try:
            yield place
        finally:
            unmount_all(wanted, place, linux.MNT_DETACH)
    finally:
        place.rmdir()


def as_readonly(mount: Mount) -> Mount:
    """The same mount, for reading only: an overlay then needs no upper and no work directory."""
    options = [option for option in mount.options if option not in ("rw", "ro")]
    if mount.type == "overlay":
        upper = overlay_option(options, "upperdir")
        lower = overlay_option(options, "lowerdir")
        options = [o for o in options if not o.startswith(("upperdir=", "workdir=", "lowerdir="))]
        layers = [layer for layer in (upper, lower) if layer]
        if len(layers) == 1 and ":" not in layers[0]:
            # overlayfs wants two layers at least where there is no upper directory
            return Mount("bind", layers[0], mount.target, ("ro", "rbind"))
        options.append("lowerdir=" + ":".join(layers))
    return Mount(mount.type, mount.source, mount.target, (*options, "ro"))


def overlay_option(options: Sequence[str], name: str) -> str:
    """The value of ``name=value`` among mount options; empty if it is not there."""
    prefix = f"{name}="
    return next((o.removeprefix(prefix) for o in options if o.startswith(prefix)), "")


def _resolve(target: Path, below: str) -> Path:
    """Where ``below`` is, resolved as if ``target`` were the root, symbolic links included."""
    if not below:
        return target
    try:
        root = os.open(target, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fd = linux.openat2(below, os.O_PATH, dir_fd=root)
        finally:
            os.close(root)
    except OSError as error:
        raise FailedPrecondition(f"mount target {below!r}: {error.strerror}") from error
    try:
        return Path(f"/proc/self/fd/{fd}").readlink()
    finally:
        os.close(fd)


def _mount_one(mount: Mount, target: Path) -> None:
    flags, data = parse_options(mount.options)
    if mount.type in ("bind", "rbind"):
        flags |= linux.MS_BIND
    propagation = flags & _PROPAGATION
    try:
        flags &= ~_PROPAGATION
        if mount.type == "overlay" and not flags & linux.MS_REMOUNT:
            _mount_overlay(mount, target, flags, data)
        else:
            fstype = "" if flags & linux.MS_BIND else mount.type
            linux.mount(mount.source, target, fstype=fstype, flags=flags, data=",".join(data))
        if propagation:
            linux.mount("", target, flags=propagation | flags & linux.MS_REC)
        if flags & linux.MS_BIND and flags & linux.MS_RDONLY:
            # mount(2): a bind mount ignores every flag but MS_REC until it is mounted again
            linux.mount("", target, flags=flags | linux.MS_REMOUNT)
    except OSError as error:
        text = f"cannot mount {mount.type} {mount.source!r} at {target}: {error.strerror}"
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            raise FailedPrecondition(text) from error
        raise MountFailed(text) from error


def _mount_overlay(mount: Mount, target: Path, flags: int, data: list[str]) -> None:
    lower = overlay_option(data, "lowerdir")
    layers = lower.split(":")
    # data-only layers ("::") and escapes are for mount(2) to read
    if not _layers_one_by_one() or "" in layers or "\\" in lower:
        linux.mount(mount.source, target, fstype="overlay", flags=flags, data=",".join(data))
        return
    fs = linux.fsopen("overlay")
    try:
        _configure_overlay(fs, mount, flags, data, layers)
        attributes = sum(bit for flag, bit in _ATTRIBUTES.items() if flags & flag)
        mount_fd = linux.fsmount(fs, attributes)
        try:
            linux.move_mount(mount_fd, target)
        finally:
            os.close(mount_fd)
    finally:
        os.close(fs)


def _configure_overlay(
    fs: int, mount: Mount, flags: int, data: list[str], layers: list[str]
) -> None:
    try:
        linux.fsconfig(fs, linux.FSCONFIG_SET_STRING, "source", mount.source)
        if flags & linux.MS_RDONLY:
            linux.fsconfig(fs, linux.FSCONFIG_SET_FLAG, "ro")
        for layer in layers:
            linux.fsconfig(fs, linux.FSCONFIG_SET_STRING, "lowerdir+", layer)
        for option in data:
            key, equals, value = option.partition("=")
            if key != "lowerdir":
                command = linux.FSCONFIG_SET_STRING if equals else linux.FSCONFIG_SET_FLAG
                linux.fsconfig(fs, command, key, value)
        linux.fsconfig(fs, linux.FSCONFIG_CMD_CREATE)
    except OSError as error:
        reasons = "; ".join(_messages(fs))
        text = f"{error.strerror} ({reasons})" if reasons else error.strerror
        raise OSError(error.errno, text, error.filename) from error


@functools.cache
def _layers_one_by_one() -> bool:
    """Whether overlayfs knows ``lowerdir+`` (Documentation/filesystems/overlayfs.rst; 6.7).

    Asked of the version, as a kernel before 6.5 takes every parameter until it creates the mount.
    """
    major, minor = os.uname().release.split(".")[:2]
    return (int(major), int("".join(c for c in minor if c.isdigit()))) >= (6, 7)


def _messages(fs: int) -> list[str]:
    """What the kernel has to say about a file system under configuration (fsopen(2))."""
    found = []
    with contextlib.suppress(OSError):
        while message := os.read(fs, 4096):
            found.append(os.fsdecode(message).strip().removeprefix("e "))
    return found


def _undo(places: list[Path]) -> None:
    for place in reversed(places):
        try:
            linux.umount(place, linux.MNT_DETACH | linux.UMOUNT_NOFOLLOW)
        except OSError as error:
            log.warning("mount not undone", path=str(place), reason=error.strerror)
