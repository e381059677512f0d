"""Mounts as data, and the doing of them.

A list of :class:`Mount` is how a snapshotter hands out a file system without mounting it: the
list is done in order and undone in reverse, by whoever wants to see the files. All functions
block. Targets are resolved as if the place that the list is mounted at were the root.
"""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from services.common import idmap, linux
from services.common.errors import FailedPrecondition, InvalidArgument, Unimplemented
from services.common.frozen import frozen
from services.common.overlay_mounts import (
    MountFailed,
    mount_classic,
    mount_mapped_overlay,
    mount_overlay,
    overlay_option,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

log = structlog.get_logger(__name__)

_UNMOUNT_ATTEMPTS = 64

# mount(8), FILESYSTEM-INDEPENDENT MOUNT OPTIONS: what each sets
_SETS = {
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
# ... and what each clears
_CLEARS = {
    "defaults": 0,
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
}
_PROPAGATIONS = {
    "shared": linux.MS_SHARED,
    "slave": linux.MS_SLAVE,
    "private": linux.MS_PRIVATE,
    "unbindable": linux.MS_UNBINDABLE,
}
_NOT_HERE = ("loop", "X-containerd.")
_SAME_IDS = idmap.IdMap()


@frozen
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


@frozen
class MountOptions:
    """Options split the way mount(2) wants them.

    Attributes:
        flags: of the mount.
        propagation: MS_SHARED or the like, perhaps with MS_REC; 0: as it comes.
        data: what is meant for the file system.
        ids: how owners are mapped; false: they are shown as they are.
    """

    flags: int
    propagation: int
    data: tuple[str, ...]
    ids: idmap.IdMap = _SAME_IDS


def parse_options(options: Sequence[str]) -> MountOptions:
    """Split fstab(5) options; a later option wins.

    Raises:
        Unimplemented: one that asks for more than a call of mount(2).
    """
    flags = propagation = 0
    data = []
    ids = {"uidmap": "", "gidmap": ""}
    for option in options:
        if option in _SETS:
            flags |= _SETS[option]
        elif option in _CLEARS:
            flags &= ~_CLEARS[option]
        elif option in _PROPAGATIONS:
            propagation = _PROPAGATIONS[option]
        elif option.startswith("r") and option[1:] in _PROPAGATIONS:
            propagation = _PROPAGATIONS[option[1:]] | linux.MS_REC
        elif option.startswith(_NOT_HERE):
            raise Unimplemented(f"mount option {option!r} is not supported here")
        elif option.startswith(("uidmap=", "gidmap=")):
            name, _, ids[name] = option.partition("=")
        elif option:
            data.append(option)
    mapping = idmap.IdMap(ids["uidmap"], ids["gidmap"])
    return MountOptions(flags, propagation, tuple(data), mapping)


def mount_all(mounts: Sequence[Mount], target: Path) -> None:
    """Do a list of mounts at ``target``, a directory that exists; all of them, or none.

    Raises:
        InvalidArgument: the list is empty.
        Unimplemented: an option asks for more than a call of mount(2).
        MountFailed: the kernel refused, or a target cannot be made.
    """
    if not mounts:
        raise InvalidArgument("there is nothing to mount: the list of mounts is empty")
    done: list[Path] = []
    try:
        for mount in mounts:
            place = _place(target, mount.target)
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
        place = _place(target, mount.target)
        try:
            linux.umount(place, flags | linux.UMOUNT_NOFOLLOW)
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise FailedPrecondition(f"{place} is still in use, and stays mounted") from error
            if error.errno not in (errno.EINVAL, errno.ENOENT):
                raise MountFailed(f"cannot unmount {place}: {error.strerror}") from error


def unmount(target: Path) -> None:
    """Unmount everything that is mounted at ``target``; nothing mounted is fine.

    What is in use goes away with its last user.

    Raises:
        MountFailed: the kernel refused.
    """
    for _ in range(_UNMOUNT_ATTEMPTS):
        try:
            linux.umount(target, linux.UMOUNT_NOFOLLOW)
        except OSError as error:
            # EINVAL: not a mount point (any more).
            if error.errno in (errno.EINVAL, errno.ENOENT):
                return
            if error.errno != errno.EBUSY:
                raise MountFailed(f"cannot unmount {target}: {error.strerror}") from error
            log.warning("mount in use, unmounting lazily", target=str(target))
            linux.umount(target, linux.UMOUNT_NOFOLLOW | linux.MNT_DETACH)
    raise MountFailed(f"cannot unmount {target}: mounts keep appearing there")


@contextlib.contextmanager
def temporary_mount(
    mounts: Sequence[Mount], directory: Path, *, readonly: bool = False
) -> Iterator[Path]:
    """Mount at a new place below ``directory`` while the context lasts; gives that place."""
    # Imported late: a shim has no use for it, nor memory for what it imports.
    import tempfile

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
    """The same mount, for reading only: an overlay then needs no upper and no work directory.

    Owners are shown as they are on the disk, where those of an upper directory are mapped already.
    """
    options = [
        option
        for option in mount.options
        if option not in ("rw", "ro") and not option.startswith(("uidmap=", "gidmap="))
    ]
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


def _place(target: Path, below: str) -> Path:
    """Where ``below`` is, made if it is missing; ``target`` is its root, for links in it too."""
    if not below:
        return target
    try:
        root = os.open(target, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fd = _open_below(root, below.strip("/"))
        finally:
            os.close(root)
    except OSError as error:
        raise MountFailed(f"mount target {below!r}: {error.strerror}") from error
    try:
        return Path(f"/proc/self/fd/{fd}").readlink()
    finally:
        os.close(fd)


def _open_below(root: int, below: str) -> int:
    try:
        return linux.openat2(below or ".", os.O_PATH, dir_fd=root)
    except FileNotFoundError:
        above, _, name = below.rpartition("/")
        directory = _open_below(root, above)
        try:
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, 0o755, dir_fd=directory)
        finally:
            os.close(directory)
        return linux.openat2(below, os.O_PATH, dir_fd=root)


def _mount_one(mount: Mount, target: Path) -> None:
    options = parse_options(mount.options)
    flags = options.flags
    if mount.type in ("bind", "rbind"):
        flags |= linux.MS_BIND | (linux.MS_REC if mount.type == "rbind" else 0)
    try:
        if options.ids:
            _mount_mapped(mount, target, flags, options)
        elif mount.type == "overlay" and not flags & linux.MS_REMOUNT:
            mount_overlay(mount.source, target, flags, options.data)
        else:
            fstype = "" if flags & linux.MS_BIND else mount.type
            mount_classic(mount.source, target, fstype, flags, options.data)
        if options.propagation:
            linux.mount("", target, flags=options.propagation)
        if flags & linux.MS_BIND and flags & ~(linux.MS_BIND | linux.MS_REC):
            # mount(2): a bind mount ignores every flag but MS_REC until it is mounted again
            linux.mount("", target, flags=(flags & ~linux.MS_REC) | linux.MS_REMOUNT)
    except OSError as error:
        raise MountFailed(
            f"cannot mount {mount.type} {mount.source!r} at {target}: {error.strerror}"
        ) from error


def _mount_mapped(mount: Mount, target: Path, flags: int, options: MountOptions) -> None:
    if flags & linux.MS_REMOUNT or not (flags & linux.MS_BIND or mount.type == "overlay"):
        raise Unimplemented(f"a mount of type {mount.type!r} cannot have its owners mapped")
    with options.ids.namespace() as namespace:
        if flags & linux.MS_BIND:
            idmap.attach(mount.source, target, namespace)
        else:
            mount_mapped_overlay(mount.source, target, flags, options.data, namespace)


def _undo(places: list[Path]) -> None:
    for place in reversed(places):
        try:
            linux.umount(place, linux.MNT_DETACH | linux.UMOUNT_NOFOLLOW)
        except OSError as error:
            log.warning("mount not undone", path=str(place), reason=error.strerror)
