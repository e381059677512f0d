"""A layer made of what differs between two lists of mounts."""

from __future__ import annotations

import contextlib
import errno
import hashlib
from pathlib import Path
from typing import IO, TYPE_CHECKING, Protocol

import zstandard
from isal import isal_zlib

from services.common.errors import FailedPrecondition, ResourceExhausted, Unimplemented
from services.common.mounts import Mount, temporary_mount
from services.common.overlay_mounts import overlay_option
from services.containerd.diff import changes
from services.containerd.diff.archive import LayerWriter
from services.containerd.diff.changes import Change, NotSelfContained
from services.containerd.diff.media_types import OCI_GZIP, OCI_TAR, OCI_ZSTD

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_GZIP_WINDOW = 31  # zlib.h: 15 bits of window, and 16 for gzip's header
_GZIP_LEVEL = 3  # isal's highest


class Compressor(Protocol):
    """What zlib and zstandard have in common."""

    def compress(self, data: bytes, /) -> bytes:
        """Take data in; returns what is ready."""

    def flush(self) -> bytes:
        """End the stream; returns the rest."""


class _Plain:
    def compress(self, data: bytes, /) -> bytes:
        return data

    def flush(self) -> bytes:
        return b""


COMPRESSORS: dict[str, Callable[[], Compressor]] = {
    OCI_TAR: _Plain,
    OCI_GZIP: lambda: isal_zlib.compressobj(_GZIP_LEVEL, wbits=_GZIP_WINDOW),
    OCI_ZSTD: lambda: zstandard.ZstdCompressor(write_checksum=True).compressobj(),
    "application/vnd.docker.image.rootfs.diff.tar": _Plain,
    "application/vnd.docker.image.rootfs.diff.tar.gzip": lambda: isal_zlib.compressobj(
        _GZIP_LEVEL, wbits=_GZIP_WINDOW
    ),
}
"""Media types of the layers that can be made here."""


def pack_layer(
    lower: Sequence[Mount],
    upper: Sequence[Mount],
    output: Path,
    *,
    media_type: str,
    newest_ns: int | None,
    scratch: Path,
) -> tuple[str, int]:
    """Write the layer that makes ``upper``'s tree of ``lower``'s to ``output``.

    Returns:
        Digest and size of the uncompressed tar.

    Raises:
        Unimplemented: there is no such layer.
        FailedPrecondition: the mounts show nothing, or something changed while it was read.
        ResourceExhausted: the disk is full.
    """
    if media_type not in COMPRESSORS:
        raise Unimplemented(f"layers of media type {media_type!r} are not made here")
    try:
        try:
            found = _stacked(lower, upper)
            return _write(output, found, media_type, newest_ns)
        except NotSelfContained:
            with _walked(lower, upper, scratch) as found:
                return _write(output, found, media_type, newest_ns)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FailedPrecondition(
            f"{error.filename!r} vanished, or was replaced, while it was read"
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ResourceExhausted("no room for the layer: make some and try again") from error


def _stacked(lower: Sequence[Mount], upper: Sequence[Mount]) -> Iterator[Change]:
    """The changes in one directory, where ``upper`` is that on top of what ``lower`` is made of."""
    below, layers = _layers(lower), _layers(upper)
    if below is None or not layers or layers[1:] != below:
        raise NotSelfContained
    return changes.of_upper(layers[0])


@contextlib.contextmanager
def _walked(
    lower: Sequence[Mount], upper: Sequence[Mount], scratch: Path
) -> Iterator[Iterator[Change]]:
    with contextlib.ExitStack() as stack:
        after = stack.enter_context(temporary_mount(upper, scratch, readonly=True))
        if lower:
            before = stack.enter_context(temporary_mount(lower, scratch, readonly=True))
        else:
            before = scratch / "empty"
            before.mkdir(exist_ok=True)
        yield changes.between(before, after)


def _layers(mounts: Sequence[Mount]) -> list[Path] | None:
    """The directories that mounts stack up, top first; None if they are not so simple."""
    if not mounts:
        return []
    mount = mounts[0]
    if len(mounts) != 1 or mount.target:
        return None
    if mount.type == "bind":
        return [Path(mount.source)]
    lower, upper = (overlay_option(mount.options, name) for name in ("lowerdir", "upperdir"))
    if mount.type != "overlay" or not lower or "\\" in lower or "::" in lower:
        return None
    return [Path(path) for path in (*([upper] if upper else []), *lower.split(":"))]


def _write(
    output: Path, found: Iterator[Change], media_type: str, newest_ns: int | None
) -> tuple[str, int]:
    with output.open("wb") as file:
        stream = _Output(file, COMPRESSORS[media_type]())
        writer = LayerWriter(stream, newest_ns=newest_ns)
        for change in found:
            writer.add(change)
        writer.close()
        file.write(stream.compressor.flush())
    return f"sha256:{stream.hash.hexdigest()}", stream.size_bytes


class _Output:
    """Hashes, counts and compresses what is written to a file."""

    def __init__(self, file: IO[bytes], compressor: Compressor) -> None:
        self._file = file
        self.compressor = compressor
        self.hash = hashlib.sha256()
        self.size_bytes = 0

    def write(self, data: bytes) -> None:
        self.hash.update(data)
        self.size_bytes += len(data)
        self._file.write(self.compressor.compress(data))
