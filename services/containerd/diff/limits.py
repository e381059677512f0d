"""What a layer may ask for: bounds on everything that a stranger's tar sets the size of."""

from __future__ import annotations

from services.common.frozen import frozen


@frozen
class Limits:
    """Bounds on one layer. Who passes one gets ``ResourceExhausted``.

    Attributes:
        stream_bytes: the uncompressed tar, padding and trailing bytes included.
        entries: files, directories, links and whiteouts.
        header_bytes: one extended header, so what all its names and attributes have together.
        path_bytes: a name with its directories, or the target of a link (PATH_MAX).
        sparse_pieces: pieces of data in one sparse file.
        window_bytes: memory that a zstd frame may ask of its decompressor.
    """

    stream_bytes: int = 1 << 40
    entries: int = 8_000_000
    header_bytes: int = 1 << 20
    path_bytes: int = 4096
    sparse_pieces: int = 1 << 17
    window_bytes: int = 128 << 20


DEFAULT_LIMITS = Limits()
