"""A layer's blob unpacked over a list of mounts."""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path
from typing import TYPE_CHECKING

from services.common import linux
from services.common.errors import FailedPrecondition, NotFound
from services.common.mounts import Mount, parse_options, temporary_mount
from services.common.overlay_mounts import overlay_option
from services.containerd.diff.apply import LayerApplier
from services.containerd.diff.limits import DEFAULT_LIMITS, Limits
from services.containerd.diff.reader import TarReader
from services.containerd.diff.stream import LayerStream

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


def unpack_layer(
    blob: Path,
    mounts: Sequence[Mount],
    *,
    scratch: Path,
    sync: bool = False,
    detached: bool = False,
    limits: Limits = DEFAULT_LIMITS,
) -> tuple[str, int]:
    """Unpack a layer over what mounts show, as ``Applier.apply`` says.

    A single bind mount is written to without mounting it, and so is the upper directory of an
    overlay: it is quicker, and that is what ends up on the disk either way.

    Returns:
        Digest and size of the uncompressed tar.
    """
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(blob.open("rb"))
        except FileNotFoundError as error:
            raise NotFound(f"the blob's file {blob.name} is gone") from error
        stream = stack.enter_context(LayerStream(file, limits))
        applier = stack.enter_context(_applier(mounts, scratch, detached=detached))
        applier.apply(TarReader(stream, limits))
        stream.drain()
        if sync:
            applier.sync()
    return stream.digest, stream.size_bytes


@contextlib.contextmanager
def _applier(mounts: Sequence[Mount], scratch: Path, *, detached: bool) -> Iterator[LayerApplier]:
    with contextlib.ExitStack() as stack:
        root, overlay, lower = _direct(mounts)
        if root is None:
            root = stack.enter_context(temporary_mount(mounts, scratch))
        merged = functools.partial(temporary_mount, mounts, scratch)
        try:
            applier = LayerApplier(
                root, overlay=overlay, lower=lower, merged=merged, detached=detached
            )
        except FileNotFoundError as error:
            raise FailedPrecondition(f"the snapshot's directory {root} does not exist") from error
        yield stack.enter_context(applier)


def _direct(mounts: Sequence[Mount]) -> tuple[Path | None, bool, list[Path]]:
    """Where mounts can be written to without mounting them; is it an overlay; its lower layers."""
    if len(mounts) != 1 or mounts[0].target:
        return None, False, []
    mount = mounts[0]
    options = parse_options(mount.options)
    if options.ids:
        return None, False, []
    if options.flags & linux.MS_RDONLY:
        raise FailedPrecondition("a layer cannot be unpacked into a read-only snapshot")
    if mount.type == "bind":
        return Path(mount.source), False, []
    upper = overlay_option(options.data, "upperdir")
    if mount.type != "overlay" or not upper or "userxattr" in options.data:
        return None, False, []
    lower = overlay_option(options.data, "lowerdir")
    return Path(upper), True, [Path(path) for path in lower.split(":") if path]
