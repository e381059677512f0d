"""Mounts as data, and the doing of them.

A list of :class:`Mount` is how a snapshotter hands out a file system without mounting it: the
list is done in order and undone in reverse, by whoever wants to see the files. All functions
block. Targets are resolved as if the place that the list is mounted at were the root.

An overlay is mounted through fsopen(2), which takes the lower directories one by one: mount(2) has
a page for all options, which some thirty layers fill. Where the kernel is too old for that (before
6.7), mount(2) does it, with the directories named from a descriptor of their common parent.

The directories of an overlay are named as they are seen from their common parent. The kernel shows
the names as they were given to everybody who reads what is mounted, and a runtime does that three
times for each container: beside a hundred others that is 20 KB instead of 46.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from services.common import idmap, linux
from services.common.errors import FailedPrecondition, InvalidArgument, Unimplemented
from services.common.frozen import frozen

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

log = structlog.get_logger(__name__)

# One page, less the byte that ends it (mount(2)); the kernel cuts what is longer without a word.
_DATA_MAX_BYTES = 4095
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
_ATTRIBUTES = {
    linux.MS_RDONLY: linux.MOUNT_ATTR_RDONLY,
    linux.MS_NOSUID: linux.MOUNT_ATTR_NOSUID,
    linux.MS_NODEV: linux.MOUNT_ATTR_NODEV,
    linux.MS_NOEXEC: linux.MOUNT_ATTR_NOEXEC,
    linux.MS_NOATIME: linux.MOUNT_ATTR_NOATIME,
    linux.MS_STRICTATIME: linux.MOUNT_ATTR_STRICTATIME,
    linux.MS_NODIRATIME: linux.MOUNT_ATTR_NODIRATIME,
}
_NOT_HERE = ("loop", "X-containerd.")
_WRITABLE = ("upperdir", "workdir")
_SAME_IDS = idmap.IdMap()


class MountFailed(FailedPrecondition):
    """The kernel refused a mount; the message has its reason."""


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


def overlay_option(options: Sequence[str], name: str) -> str:
    """The value of ``name=value`` among mount options; empty if it is not there."""
    prefix = f"{name}="
    return next((o.removeprefix(prefix) for o in options if o.startswith(prefix)), "")


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
            _mount_overlay(mount, target, flags, options.data)
        else:
            fstype = "" if flags & linux.MS_BIND else mount.type
            _mount_classic(mount.source, target, fstype, flags, options.data)
        if options.propagation:
            linux.mount("", target, flags=options.propagation)
        if flags & linux.MS_BIND and flags & ~(linux.MS_BIND | linux.MS_REC):
            # mount(2): a bind mount ignores every flag but MS_REC until it is mounted again
            linux.mount("", target, flags=(flags & ~linux.MS_REC) | linux.MS_REMOUNT)
    except OSError as error:
        raise MountFailed(
            f"cannot mount {mount.type} {mount.source!r} at {target}: {error.strerror}"
        ) from error


def _mount_classic(source: str, target: Path, fstype: str, flags: int, data: Sequence[str]) -> None:
    text = ",".join(data)
    if (size := len(os.fsencode(text))) > _DATA_MAX_BYTES:
        raise MountFailed(
            f"cannot mount {fstype} at {target}: its options take {size} bytes, and the kernel "
            f"takes {_DATA_MAX_BYTES}"
        )
    linux.mount(source, target, fstype=fstype, flags=flags, data=text)


def _mount_mapped(mount: Mount, target: Path, flags: int, options: MountOptions) -> None:
    if flags & linux.MS_REMOUNT or not (flags & linux.MS_BIND or mount.type == "overlay"):
        raise Unimplemented(f"a mount of type {mount.type!r} cannot have its owners mapped")
    with options.ids.namespace() as namespace:
        if flags & linux.MS_BIND:
            idmap.attach(mount.source, target, namespace)
        else:
            _mount_mapped_overlay(mount, target, flags, options.data, namespace)


def _mount_mapped_overlay(
    mount: Mount, target: Path, flags: int, data: Sequence[str], namespace: int
) -> None:
    """Mount an overlay on lower directories with mapped owners.

    The directory that has them all is shown, mapped, at the target itself for a moment, because
    layers have to be in the mount namespace while the overlay is made; it then has its own copies.
    """
    layers = overlay_option(data, "lowerdir").split(":")
    common = os.path.commonpath([str(Path(layer).parent) for layer in layers])
    idmap.attach(common, target, namespace, attributes=linux.MOUNT_ATTR_RDONLY)
    try:
        directory = os.open(target, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            shown = (f"/proc/self/fd/{directory}/{os.path.relpath(p, common)}" for p in layers)
            rest = [option for option in data if not option.startswith("lowerdir=")]
            _mount_overlay(mount, target, flags, [*rest, f"lowerdir={':'.join(shown)}"])
        finally:
            os.close(directory)
        overlay = linux.clone_tree(target)
        linux.umount(target, linux.MNT_DETACH | linux.UMOUNT_NOFOLLOW)
    finally:
        linux.umount(target, linux.MNT_DETACH | linux.UMOUNT_NOFOLLOW)
    try:
        linux.move_mount(overlay, target)
    finally:
        os.close(overlay)


def _mount_overlay(mount: Mount, target: Path, flags: int, data: Sequence[str]) -> None:
    lower = overlay_option(data, "lowerdir")
    layers = lower.split(":")
    # data-only layers ("::") and escapes are for mount(2) to read
    if not _layers_one_by_one() or "" in layers or "\\" in lower:
        _mount_overlay_classic(mount.source, target, flags, data)
        return
    common = _common_parent([*layers, *(overlay_option(data, name) for name in _WRITABLE)])
    fs = linux.fsopen("overlay")
    try:
        with _working_in(common):
            near = [_seen_from(common, layer) for layer in layers]
            _configure_overlay(fs, mount, flags, [_option_from(common, o) for o in data], near)
        attributes = sum(bit for flag, bit in _ATTRIBUTES.items() if flags & flag)
        mount_fd = linux.fsmount(fs, attributes)
        try:
            linux.move_mount(mount_fd, target)
        finally:
            os.close(mount_fd)
    finally:
        os.close(fs)


def _mount_overlay_classic(source: str, target: Path, flags: int, data: Sequence[str]) -> None:
    """Mount an overlay with mount(2), shortening the names of its layers if they are too long."""
    layers = overlay_option(data, "lowerdir").split(":")
    if len(os.fsencode(",".join(data))) <= _DATA_MAX_BYTES or "" in layers:
        _mount_classic(source, target, "overlay", flags, data)
        return
    common = os.path.commonpath([str(Path(layer).parent) for layer in layers])
    directory = os.open(common, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        near = f"/proc/self/fd/{directory}"
        short = ":".join(f"{near}/{os.path.relpath(layer, common)}" for layer in layers)
        rest = [option for option in data if not option.startswith("lowerdir=")]
        _mount_classic(source, target, "overlay", flags, [*rest, f"lowerdir={short}"])
    finally:
        os.close(directory)


def _common_parent(directories: Sequence[str]) -> str:
    """The directory that has them all, with a slash at its end; empty if some are not absolute."""
    given = [directory.rstrip("/") for directory in directories if directory]
    if not all(directory.startswith("/") for directory in given):
        return ""
    return os.path.commonpath([directory.rpartition("/")[0] or "/" for directory in given]) + "/"


def _seen_from(common: str, path: str) -> str:
    return path[len(common) :].lstrip("/") if common and path.startswith(common) else path


def _option_from(common: str, option: str) -> str:
    key, equals, value = option.partition("=")
    return f"{key}{equals}{_seen_from(common, value)}" if key in _WRITABLE else option


@contextlib.contextmanager
def _working_in(directory: str) -> Iterator[None]:
    """Have this thread, and no other, work in a directory while the context lasts; empty: stay."""
    if not directory:
        yield
        return
    linux.unshare(linux.CLONE_FS)
    before = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.chdir(directory)
        yield
    finally:
        os.fchdir(before)
        os.close(before)


def _configure_overlay(
    fs: int, mount: Mount, flags: int, data: Sequence[str], layers: Sequence[str]
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
        told = f"{reasons}, in {os.getcwd()}"  # noqa: PTH109
        text = f"{error.strerror} ({told})" if reasons else error.strerror
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
