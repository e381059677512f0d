"""Streams that may be gzip or zstd, and streams made into gzip."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import TYPE_CHECKING

from isal import igzip_lib, isal_zlib

from services.common.errors import DataLoss
from services.containerd.content.store import CHUNK_BYTES

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

GZIP_MAGIC = b"\x1f\x8b"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"

_ZSTD_WINDOW_BYTES = 128 << 20
_ZSTD_FED_BYTES = 512
_GZIP_WINDOW = 31  # zlib's way to say: 32 KiB, with gzip's header and trailer


async def decompressed(source: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
    """The bytes of ``source``, decompressed if they are gzip or zstd.

    Several members, or frames, make one stream. Pieces are bounded, however well they compress.

    Raises:
        DataLoss: the compressed data is broken or cut short.
    """
    head = b""
    while len(head) < len(ZSTD_MAGIC):
        piece = await anext(source, b"")
        if not piece:
            break
        head += piece
    whole = _prefixed(head, source)
    if head.startswith(ZSTD_MAGIC):
        whole = _unzstd(whole)
    elif head.startswith(GZIP_MAGIC):
        whole = _gunzip(whole)
    async with aclosing(whole) as pieces:
        async for piece in pieces:
            yield piece


async def _prefixed(head: bytes, source: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
    if head:
        yield head
    async for piece in source:
        yield piece


async def _gunzip(source: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
    data = await anext(source)
    member = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP)
    while True:
        piece = await asyncio.to_thread(_inflate, member, data)
        data = b""
        if piece:
            yield piece
        if member.eof:
            data = member.unused_data or await anext(source, b"")
            if not data.lstrip(b"\0"):
                return
            member = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP)
        elif member.needs_input:
            data = await anext(source, b"")
            if not data:
                raise DataLoss("the archive's gzip stream is cut short")


async def _unzstd(source: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
    frames = await asyncio.to_thread(_ZstdFrames)
    async for data in source:
        frames.feed(data)
        while piece := await asyncio.to_thread(frames.expand):
            yield piece
    if frames.is_inside:
        raise DataLoss("the archive's zstd stream is cut short")


class _ZstdFrames:
    """All frames of a stream (RFC 8878, 3.1), a bounded piece at a time.

    libzstd gives all that its input makes, and a block of four bytes can make 128 KiB: so it is fed
    a few of them at once.
    """

    def __init__(self) -> None:
        import zstandard

        self._error = zstandard.ZstdError
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES)
        self._frame = self._decompressor.decompressobj()
        self._data = b""
        self._at = 0
        self.is_inside = False

    def feed(self, data: bytes) -> None:
        """Take in the next compressed bytes."""
        self._data, self._at = data, 0

    def expand(self) -> bytes:
        """The next bytes; empty when more have to be fed first."""
        pieces, size = [], 0
        while self._at < len(self._data) and size < CHUNK_BYTES:
            fed = self._data[self._at : self._at + _ZSTD_FED_BYTES]
            self._at += len(fed)
            try:
                piece = self._frame.decompress(fed)
            except self._error as error:
                raise DataLoss(f"the archive's zstd stream is corrupt: {error}") from error
            self.is_inside = not self._frame.eof
            if self._frame.eof:
                self._at -= len(self._frame.unused_data)
                self._frame = self._decompressor.decompressobj()
            pieces.append(piece)
            size += len(piece)
        return b"".join(pieces)


async def gzipped(source: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The bytes of ``source`` compressed with gzip, always the same for the same bytes."""
    deflate = isal_zlib.compressobj(level=2, wbits=_GZIP_WINDOW)
    async for piece in source:
        if packed := await asyncio.to_thread(deflate.compress, piece):
            yield packed
    yield await asyncio.to_thread(deflate.flush)


def _inflate(member: igzip_lib.IgzipDecompressor, data: bytes) -> bytes:
    try:
        return member.decompress(data, CHUNK_BYTES)
    except igzip_lib.error as error:  # type: ignore[misc]  # its stub says: an instance
        raise DataLoss(f"the archive's gzip stream is corrupt: {error}") from error
