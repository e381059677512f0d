"""A tar archive of images, read from and written to a stream of bytes without blocking.

Reading knows ustar, GNU's long names and pax names and sizes: what ``docker save``, ``skopeo`` and
clients of containerd write. Layers themselves are read elsewhere.
"""

from __future__ import annotations

import tarfile
from typing import TYPE_CHECKING

from services.common.errors import DataLoss, InvalidArgument, ResourceExhausted
from services.common.frozen import frozen
from services.containerd.content.store import CHUNK_BYTES

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

_BLOCK_BYTES = 512
_END = bytes(_BLOCK_BYTES)
_EXTENSION_MAX_BYTES = 1 << 20


@frozen
class TarEntry:
    """A member of an archive; ``link`` is the target of a symbolic or hard link, or empty."""

    name: str
    size_bytes: int
    is_file: bool
    is_symlink: bool
    link: str


class TarStream:
    """Reads an archive: ``next``, then its data once by ``chunks`` or ``read``, if wanted.

    Args:
        source: the bytes, in pieces of any size.
        max_entries: how many members there may be.
        max_bytes: how many bytes there may be.
    """

    def __init__(self, source: AsyncIterator[bytes], *, max_entries: int, max_bytes: int) -> None:
        self._source = source
        self._max_entries = max_entries
        self._max_bytes = max_bytes
        self._entries = 0
        self._bytes = 0
        self._piece = b""
        self._position = 0
        self._left = 0  # of the present member's data
        self._padding = 0

    async def next(self) -> TarEntry | None:
        """The next member, or None at the end.

        Raises:
            InvalidArgument: that is no tar archive.
            DataLoss: it is cut short.
            ResourceExhausted: it passes a bound.
        """
        await self._skip(self._left + self._padding)
        self._left = self._padding = 0
        found = await self._member()
        if found is None:
            return None
        header, name, link, size_bytes = found
        self._entries += 1
        if self._entries > self._max_entries:
            raise ResourceExhausted(f"the archive has more than {self._max_entries} entries")
        is_file = header.type in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
        self._left = size_bytes if is_file else 0
        self._padding = -self._left % _BLOCK_BYTES
        is_link = header.type in (tarfile.SYMTYPE, tarfile.LNKTYPE)
        return TarEntry(
            name=name,
            size_bytes=self._left,
            is_file=is_file,
            is_symlink=header.type == tarfile.SYMTYPE,
            link=link if is_link else "",
        )

    async def chunks(self) -> AsyncIterator[bytes]:
        """The present member's data, in pieces of about ``CHUNK_BYTES``."""
        while self._left:
            data = await self._take(min(self._left, CHUNK_BYTES))
            self._left -= len(data)
            yield data

    async def read(self, *, max_bytes: int) -> bytes:
        """The whole data of a small member.

        Raises:
            ResourceExhausted: it is larger than ``max_bytes``.
        """
        if self._left > max_bytes:
            raise ResourceExhausted(
                f"a document of the archive has {self._left} bytes, more than {max_bytes}"
            )
        data = await self._take(self._left)
        self._left = 0
        return data

    async def _member(self) -> tuple[tarfile.TarInfo, str, str, int] | None:
        """The next member's header, name, link and size, by what stands before it too."""
        name = link = ""
        size: int | None = None
        while (header := await self._header()) is not None:
            match header.type:
                case tarfile.GNUTYPE_LONGNAME:
                    name = _text(await self._extension(header.size))
                case tarfile.GNUTYPE_LONGLINK:
                    link = _text(await self._extension(header.size))
                case tarfile.XHDTYPE:
                    fields = _pax(await self._extension(header.size))
                    name, link = fields.get("path", name), fields.get("linkpath", link)
                    size = _number(fields["size"]) if "size" in fields else size
                case tarfile.XGLTYPE:
                    await self._extension(header.size)
                case _:
                    size = header.size if size is None else size
                    return header, name or header.name, link or header.linkname, size
        return None

    async def _header(self) -> tarfile.TarInfo | None:
        block = await self._take(_BLOCK_BYTES, may_end=True)
        if not block or block == _END:
            return None
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise InvalidArgument(f"this is no tar archive: {error}") from error
        if header.size < 0:
            raise InvalidArgument("this is no tar archive: a member has a negative size")
        return header

    async def _extension(self, size: int) -> bytes:
        if size > _EXTENSION_MAX_BYTES:
            raise ResourceExhausted(f"a header of the archive has {size} bytes")
        data = await self._take(size)
        await self._skip(-size % _BLOCK_BYTES)
        return data

    async def _skip(self, count: int) -> None:
        while count:
            count -= len(await self._take(min(count, CHUNK_BYTES)))

    async def _take(self, count: int, *, may_end: bool = False) -> bytes:
        """Exactly ``count`` bytes; none at all at the end, if that may be here."""
        parts, missing = [], count
        while missing:
            if self._position == len(self._piece):
                try:
                    self._piece, self._position = await anext(self._source), 0
                except StopAsyncIteration:
                    if may_end and missing == count:
                        return b""
                    raise DataLoss("the archive is cut short") from None
                self._bytes += len(self._piece)
                if self._bytes > self._max_bytes:
                    raise ResourceExhausted(f"the archive has more than {self._max_bytes} bytes")
            part = self._piece[self._position : self._position + missing]
            self._position += len(part)
            missing -= len(part)
            parts.append(part)
        return b"".join(parts)


def file_header(name: str, size_bytes: int, *, mode: int = 0o444) -> bytes:
    """The header of a file to write; its data follows, then ``padding``."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = size_bytes, mode
    return info.tobuf(tarfile.GNU_FORMAT)


def directory_header(name: str) -> bytes:
    """The header of a directory to write."""
    info = tarfile.TarInfo(name)
    info.type, info.mode = tarfile.DIRTYPE, 0o755
    return info.tobuf(tarfile.GNU_FORMAT)


def padding(size_bytes: int) -> bytes:
    """What fills the last block of a file up."""
    return bytes(-size_bytes % _BLOCK_BYTES)


END = _END * 2
"""The end of an archive."""


def _pax(data: bytes) -> dict[str, str]:
    fields = {}
    while data:
        length, space, rest = data.partition(b" ")
        end = _number(length.decode("ascii", "replace"))
        if not space or not len(length) + 1 < end <= len(data):
            raise InvalidArgument("this is no tar archive: an extended header is malformed")
        key, _, value = rest[: end - len(length) - 2].partition(b"=")
        fields[_text(key)] = _text(value)
        data = data[end:]
    return fields


def _number(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise InvalidArgument("this is no tar archive: an extended header has no number in place")
    return int(text)


def _text(data: bytes) -> str:
    return data.rstrip(b"\0").decode("utf-8", "surrogateescape")
