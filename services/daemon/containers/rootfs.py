"""Reading an image's files through a container's snapshot, before the container runs."""

from __future__ import annotations

import os
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from services.common import linux
from services.common.errors import FailedPrecondition, Internal
from services.daemon.spec.layers import layers_of_mount

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from services.daemon.containers.runtime import RootMount

_PREFIX = "root-"


def root_layers(mounts: Sequence[RootMount]) -> tuple[Path, ...]:
    """The directories behind a snapshot's mounts, topmost first.

    Raises:
        FailedPrecondition: they are not of a kind that can be read without mounting.
    """
    if len(mounts) != 1:
        raise FailedPrecondition(f"cannot read a root file system made of {len(mounts)} mounts")
    mount = mounts[0]
    return layers_of_mount(fstype=mount.type, source=mount.source, options=mount.options)


@contextmanager
def readable_root(mounts: Sequence[RootMount], scratch: Path) -> Iterator[Path]:
    """A directory that shows a snapshot, to be read only. Blocks.

    Args:
        mounts: of the snapshot.
        scratch: directory below which it is mounted, if it has to be.
    """
    layers = root_layers(mounts)
    if len(layers) == 1:
        yield layers[0]
        return
    scratch.mkdir(mode=0o700, parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=scratch))
    try:
        _mount(layers, place)
        try:
            yield place
        finally:
            linux.umount(place, linux.MNT_DETACH)
    except OSError as error:
        raise Internal(f"cannot read the image's files: {error.strerror}: {place}") from error
    finally:
        place.rmdir()


def sweep(scratch: Path) -> None:
    """Unmount and remove what a crash left in ``scratch``. Blocks."""
    for place in scratch.glob(f"{_PREFIX}*"):
        with suppress(OSError):
            linux.umount(place, linux.MNT_DETACH)
        with suppress(OSError):
            place.rmdir()


def _mount(layers: Sequence[Path], place: Path) -> None:
    try:
        _mount_one_by_one(layers, place)
    except OSError:
        # Before Linux 6.7 overlayfs takes its layers in one string only, at most a page long.
        lower = ":".join(str(layer) for layer in layers)
        data = f"lowerdir={lower}"
        linux.mount("overlay", place, fstype="overlay", flags=linux.MS_RDONLY, data=data)


def _mount_one_by_one(layers: Sequence[Path], place: Path) -> None:
    context = linux.fsopen("overlay")
    try:
        for layer in layers:
            linux.fsconfig(context, linux.FSCONFIG_SET_STRING, "lowerdir+", str(layer))
        linux.fsconfig(context, linux.FSCONFIG_CMD_CREATE)
        mounted = linux.fsmount(context, linux.MOUNT_ATTR_RDONLY)
    finally:
        os.close(context)
    try:
        linux.move_mount(mounted, place)
    finally:
        os.close(mounted)
