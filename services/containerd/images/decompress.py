"""Streams that may be gzip, and streams made into gzip."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from isal import igzip_lib, isal_zlib

from services.common.errors import DataLoss, Unimplemented
from services.containerd.content.store import CHUNK_BYTES

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

GZIP_MAGIC = b"\x1f\x8b"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"

_GZIP_WINDOW = 31  # zlib's way to say: 32 KiB, with gzip's header and trailer


async def gunzipped(source: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
    """The bytes of ``source``, decompressed if they are gzip (several members make one stream).

    Raises:
        DataLoss: the compressed data is broken or cut short.
        Unimplemented: they are compressed in another way.
    """
    head = b""
    while len(head) < len(ZSTD_MAGIC):
        piece = await anext(source, b"")
        if not piece:
            break
        head += piece
    if head.startswith(ZSTD_MAGIC):
        raise Unimplemented("archives compressed with zstd are not taken: decompress it first")
    if not head.startswith(GZIP_MAGIC):
        if head:
            yield head
        async for piece in source:
            yield piece
        return
    member = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP)
    data = head
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
