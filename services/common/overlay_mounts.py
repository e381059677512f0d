"""One mount: of any file system by mount(2), of an overlay layer by layer.

An overlay is mounted through fsopen(2), which takes the lower directories one by one: mount(2) has
a page for all options, which some thirty layers fill. Where the kernel is too old for that (before
6.7), mount(2) does it.

The directories of an overlay are named as they are seen from their common parent: always where that
is done by fsopen(2), and by mount(2) if they are too long for it otherwise. The kernel shows
the names as they were given to everybody who reads what is mounted, and a runtime does that three
times for each container: beside a hundred others that is 20 KB instead of 46.
"""

from __future__ import annotations

import contextlib
import functools
import os
from pathlib import Path
from typing import TYPE_CHECKING

from services.common import idmap, linux
from services.common.errors import FailedPrecondition

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

# One page, less the byte that ends it (mount(2)); the kernel cuts what is longer without a word.
_DATA_MAX_BYTES = 4095
_WRITABLE = ("upperdir", "workdir")
_ATTRIBUTES = {
    linux.MS_RDONLY: linux.MOUNT_ATTR_RDONLY,
    linux.MS_NOSUID: linux.MOUNT_ATTR_NOSUID,
    linux.MS_NODEV: linux.MOUNT_ATTR_NODEV,
    linux.MS_NOEXEC: linux.MOUNT_ATTR_NOEXEC,
    linux.MS_NOATIME: linux.MOUNT_ATTR_NOATIME,
    linux.MS_STRICTATIME: linux.MOUNT_ATTR_STRICTATIME,
    linux.MS_NODIRATIME: linux.MOUNT_ATTR_NODIRATIME,
}


class MountFailed(FailedPrecondition):
    """The kernel refused a mount; the message has its reason."""


def overlay_option(options: Sequence[str], name: str) -> str:
    """The value of ``name=value`` among mount options; empty if it is not there."""
    prefix = f"{name}="
    return next((o.removeprefix(prefix) for o in options if o.startswith(prefix)), "")


def mount_classic(source: str, target: Path, fstype: str, flags: int, data: Sequence[str]) -> None:
    """Mount by mount(2).

    Raises:
        MountFailed: the options are more than the kernel takes.
        OSError: the kernel refuses.
    """
    text = ",".join(data)
    if (size := len(os.fsencode(text))) > _DATA_MAX_BYTES:
        raise MountFailed(
            f"cannot mount {fstype} at {target}: its options take {size} bytes, and the kernel "
            f"takes {_DATA_MAX_BYTES}"
        )
    linux.mount(source, target, fstype=fstype, flags=flags, data=text)


def mount_mapped_overlay(
    source: str, target: Path, flags: int, data: Sequence[str], namespace: int
) -> None:
    """Mount an overlay on lower directories with owners mapped as in a user namespace.

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
            mount_overlay(source, target, flags, [*rest, f"lowerdir={':'.join(shown)}"])
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


def mount_overlay(source: str, target: Path, flags: int, data: Sequence[str]) -> None:
    """Mount an overlay; raises as :func:`mount_classic`."""
    lower = overlay_option(data, "lowerdir")
    layers = lower.split(":")
    # data-only layers ("::") and escapes are for mount(2) to read
    if not _layers_one_by_one() or "" in layers or "\\" in lower:
        _mount_overlay_classic(source, target, flags, data)
        return
    common, near = _shortened(data)
    fs = linux.fsopen("overlay")
    try:
        with _working_in(common):
            _configure_overlay(fs, source, flags, near)
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
        mount_classic(source, target, "overlay", flags, data)
        return
    common, near = _shortened(data)
    there = target.absolute()  # seen from where this thread works now
    with _working_in(common):
        mount_classic(source, there, "overlay", flags, near)


def _common_parent(directories: Sequence[str]) -> str:
    """The directory that has them all, with a slash at its end; empty if there is none."""
    parents = ["".join(path.rstrip("/").rpartition("/")[:2]) for path in directories if path]
    if len({parent.startswith("/") for parent in parents}) > 1:  # some are named from here
        return ""
    common = os.path.commonpath(parents)
    return f"{common}/" if common.strip("/") else ""


def _shortened(data: Sequence[str]) -> tuple[str, list[str]]:
    """The directory that has all of an overlay's, and the options as they are seen from there."""
    lower = overlay_option(data, "lowerdir").split(":")
    common = _common_parent([*lower, *(overlay_option(data, name) for name in _WRITABLE)])
    return common, [_option_from(common, option) for option in data]


def _option_from(common: str, option: str) -> str:
    key, equals, value = option.partition("=")
    if key == "lowerdir":
        return "lowerdir=" + ":".join(_seen_from(common, layer) for layer in value.split(":"))
    return f"{key}{equals}{_seen_from(common, value)}" if key in _WRITABLE else option


def _seen_from(common: str, path: str) -> str:
    return path[len(common) :].lstrip("/") if common and path.startswith(common) else path


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


def _configure_overlay(fs: int, source: str, flags: int, data: Sequence[str]) -> None:
    try:
        linux.fsconfig(fs, linux.FSCONFIG_SET_STRING, "source", source)
        if flags & linux.MS_RDONLY:
            linux.fsconfig(fs, linux.FSCONFIG_SET_FLAG, "ro")
        for layer in overlay_option(data, "lowerdir").split(":"):
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
