"""A tar archive read from a stream, fast: the headers of layers, and their data.

Reads ustar and what came before it, GNU's long names, base-256 numbers and sparse files, and pax
with attributes, sub-second times and sparse files of version 1.0. The format is described in tar(5)
of libarchive, in POSIX (pax, "ustar Interchange Format") and in GNU tar's manual, "Tar Internals".

Everything that is malformed is ``DataLoss``; what is too large is ``ResourceExhausted``.
"""

from __future__ import annotations

import os
import struct
import zlib
from typing import TYPE_CHECKING, NamedTuple

from services.common.errors import DataLoss, InvalidArgument, ResourceExhausted

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Self

    from services.containerd.diff.limits import Limits
    from services.containerd.diff.stream import LayerStream

REGULAR, HARDLINK, SYMLINK = b"0", b"1", b"2"
CHARACTER, BLOCK, DIRECTORY, FIFO = b"3", b"4", b"5", b"6"

XATTR_PREFIX = "SCHILY.xattr."

_BLOCK_BYTES = 512
_ZEROS = bytes(_BLOCK_BYTES)
# name mode uid gid size mtime checksum type linkname magic version uname gname major minor prefix
_HEADER = struct.Struct("100s8s8s8s12s12s8sc100s6s2s32s32s8s8s155s12x")
_USTAR_MAGIC, _GNU_MAGIC = b"ustar\0", b"ustar "
_EXTENSIONS = b"xgLK"
_GNU_SPARSE = b"S"
_OLD_REGULAR = b"\0"
_CONTIGUOUS = b"7"
_KINDS = frozenset([REGULAR, HARDLINK, SYMLINK, CHARACTER, BLOCK, DIRECTORY, FIFO])
_HAS_DATA = frozenset([REGULAR, _GNU_SPARSE])
_MAX_NUMBER = 1 << 62
_NS = 1_000_000_000
_NO_XATTRS: Mapping[str, bytes] = {}


class Entry(NamedTuple):
    """One member of the archive. A tuple, since there are tens of thousands in a layer.

    ``name`` and ``linkname`` are as they stand in the archive, undecodable bytes as surrogates.
    ``size_bytes`` is the file's size, holes included; ``mode`` has the permission bits alone.
    """

    kind: bytes
    name: str
    linkname: str
    size_bytes: int
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    atime_ns: int
    device: tuple[int, int]
    xattrs: Mapping[str, bytes]


class TarReader:
    """Iterates over the entries; ``copy`` takes the data of the one that was given last."""

    def __init__(self, stream: LayerStream, limits: Limits) -> None:
        self._stream = stream
        self._limits = limits
        self._entries = 0
        self._left = 0  # bytes of the entry's data in the archive that are not read yet
        self._padding = 0
        self._pieces: list[tuple[int, int]] | None = None  # of a sparse file: offset, length
        self._size_bytes = 0

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Entry:
        self._skip(self._left + self._padding)
        self._left = self._padding = 0
        self._pieces = None
        pax: dict[str, bytes] = {}
        long_name = long_link = None
        while True:
            block = self._header_block()
            if block is None:
                raise StopIteration
            kind = block[156:157]
            if kind not in _EXTENSIONS:
                break
            data = self._extension(_size(block[124:136]))
            if kind == b"x":
                pax = _parse_pax(data)
            elif kind == b"L":
                long_name = data
            elif kind == b"K":
                long_link = data
            # A global header (g) says nothing that matters to a layer.
        self._entries += 1
        if self._entries > self._limits.entries:
            raise ResourceExhausted(f"the layer has more than {self._limits.entries} entries")
        return self._entry(block, pax, long_name, long_link)

    def copy(self, fd: int) -> None:
        """Write the data of the present entry to ``fd``, a new file; holes stay holes."""
        if self._pieces is None:
            left, self._left = self._left, 0
            if left and self._stream.copy(left, fd) < left:
                raise _cut_short()
            return
        for offset, length in self._pieces:
            os.lseek(fd, offset, os.SEEK_SET)
            self._left -= length
            if self._left < 0:
                raise DataLoss("a sparse file has less data than its map says")
            if self._stream.copy(length, fd) < length:
                raise _cut_short()
        os.ftruncate(fd, self._size_bytes)

    def _entry(
        self,
        block: bytes,
        pax: dict[str, bytes],
        long_name: bytes | None,
        long_link: bytes | None,
    ) -> Entry:
        fields = _HEADER.unpack(block)
        kind = fields[7]
        name = _decode(pax.get("path") or long_name) or _name(fields)
        linkname = _decode(pax.get("linkpath") or long_link) or _text(fields[8])
        if kind in (_OLD_REGULAR, _CONTIGUOUS):
            kind = REGULAR
        size = _pax_number(pax["size"]) if pax.get("size") else _size(fields[4])
        self._left = size if kind in _HAS_DATA else 0
        self._padding = -self._left % _BLOCK_BYTES
        self._size_bytes = size
        if kind == REGULAR and name.endswith("/"):
            kind = DIRECTORY  # as before there was a type for it
        if kind not in _KINDS and kind != _GNU_SPARSE:
            raise InvalidArgument(
                f"entry {name!r} of the layer has type {kind!r}, which is not known"
            )
        if kind == _GNU_SPARSE:
            self._read_gnu_sparse_map(block)
            kind = REGULAR
        elif pax and any(key.startswith("GNU.sparse.") for key in pax):
            name = self._read_pax_sparse_map(pax) or name
        if len(name) > self._limits.path_bytes or len(linkname) > self._limits.path_bytes:
            raise ResourceExhausted(f"a name in the layer is too long: {name[:128]!r}...")
        mtime = _pax_time(pax["mtime"]) if pax.get("mtime") else _number(fields[5]) * _NS
        return Entry(
            kind,
            name,
            linkname,
            self._size_bytes,
            _number(fields[1]) & 0o7777,
            _pax_number(pax["uid"]) if pax.get("uid") else _number(fields[2]),
            _pax_number(pax["gid"]) if pax.get("gid") else _number(fields[3]),
            mtime,
            _pax_time(pax["atime"]) if pax.get("atime") else mtime,
            (_number(fields[13]), _number(fields[14])) if kind in (CHARACTER, BLOCK) else (0, 0),
            {
                key.removeprefix(XATTR_PREFIX): value
                for key, value in pax.items()
                if key.startswith(XATTR_PREFIX)
            }
            if pax
            else _NO_XATTRS,
        )

    def _header_block(self) -> bytes | None:
        """The next header, its checksum verified; None at the end of the archive."""
        block = self._stream.read(_BLOCK_BYTES)
        if block == _ZEROS:
            second = self._stream.read(_BLOCK_BYTES)
            if second and second != _ZEROS:
                raise DataLoss("the layer's tar is corrupt: data behind a block of zeros")
            return None
        if not block:
            return None  # no end mark, as some writers leave it
        if len(block) < _BLOCK_BYTES:
            raise _cut_short()
        field = block[148:156]
        # The header's sum, its own field taken as spaces, out of the Adler checksum: a C loop.
        expected = _number(field) + sum(field) - 8 * 0x20 + 1
        if (zlib.adler32(block) - expected) & 0xFFFF and not _checksum_matches(block):
            raise DataLoss("the layer's tar is corrupt: a header does not match its checksum")
        return block

    def _extension(self, length: int) -> bytes:
        if length > self._limits.header_bytes:
            raise ResourceExhausted(
                f"a header in the layer has {length} bytes, more than {self._limits.header_bytes}"
            )
        data = self._stream.read(length)
        if len(data) < length:
            raise _cut_short()
        self._skip(-length % _BLOCK_BYTES)
        return data

    def _read_gnu_sparse_map(self, block: bytes) -> None:
        """GNU tar's manual, "Old GNU Format": 4 pieces in the header, 21 in each block behind."""
        pieces: list[tuple[int, int]] = []
        self._size_bytes = _size(block[483:495])
        table, more = block[386:482], block[482]
        while True:
            for at in range(0, len(table), 24):
                if table[at] == 0:
                    break
                pieces.append((_number(table[at : at + 12]), _number(table[at + 12 : at + 24])))
            if not more:
                break
            block = self._stream.read(_BLOCK_BYTES)
            if len(block) < _BLOCK_BYTES:
                raise _cut_short()
            table, more = block[:504], block[504]
            if len(pieces) > self._limits.sparse_pieces:
                break
        self._pieces = self._checked(pieces)

    def _read_pax_sparse_map(self, pax: dict[str, bytes]) -> str | None:
        """GNU tar's manual, "PAX Format, Version 1.0": decimal lines in front of the data."""
        version = (pax.get("GNU.sparse.major"), pax.get("GNU.sparse.minor"))
        if version != (b"1", b"0"):
            raise InvalidArgument("the layer has a sparse file of a pax version other than 1.0")
        self._size_bytes = _pax_number(pax.get("GNU.sparse.realsize", b""))
        text = b""
        numbers: list[bytes] = []
        wanted = 1
        while len(numbers) < wanted:
            if self._left < _BLOCK_BYTES:
                raise DataLoss("the map of a sparse file is cut short")
            block = self._stream.read(_BLOCK_BYTES)
            if len(block) < _BLOCK_BYTES:
                raise _cut_short()
            self._left -= _BLOCK_BYTES
            *lines, text = (text + block).split(b"\n")
            numbers += lines
            if numbers:
                wanted = 1 + 2 * min(_pax_number(numbers[0]), self._limits.sparse_pieces + 1)
        values = [_pax_number(number) for number in numbers[1:wanted]]
        self._pieces = self._checked(list(zip(values[::2], values[1::2], strict=True)))
        return _decode(pax.get("GNU.sparse.name"))

    def _checked(self, pieces: list[tuple[int, int]]) -> list[tuple[int, int]]:
        if len(pieces) > self._limits.sparse_pieces:
            raise ResourceExhausted(
                f"a sparse file in the layer has more than {self._limits.sparse_pieces} pieces"
            )
        end = 0
        for offset, length in pieces:
            if offset < end or length < 0:
                raise DataLoss("the pieces of a sparse file overlap")
            end = offset + length
        if end > self._size_bytes:
            raise DataLoss("a sparse file has data behind its end")
        return pieces

    def _skip(self, length: int) -> None:
        if length and self._stream.skip(length) < length:
            raise _cut_short()


def _cut_short() -> DataLoss:
    return DataLoss("the layer's tar is cut short")


def _checksum_matches(block: bytes) -> bool:
    """Compare exactly; old tars took bytes as signed (tar(5), "Header Checksum")."""
    rest = block[:148] + b" " * 8 + block[156:]
    unsigned = sum(rest)
    return _number(block[148:156]) in (unsigned, unsigned - 256 * sum(b > 127 for b in rest))


def _number(field: bytes) -> int:
    """Octal digits, or base 256 where the first bit is set (tar(5), "Numeric Extensions")."""
    if field[0] & 0x80:
        number = int.from_bytes(field, "big", signed=True)
        if not field[0] & 0x40:
            number = int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
        if not -_MAX_NUMBER < number < _MAX_NUMBER:
            raise DataLoss(f"the layer's tar is corrupt: number {number} in a header")
        return number
    try:
        return int(field.rstrip(b"\0 ") or b"0", 8)
    except ValueError as error:
        raise DataLoss(f"the layer's tar is corrupt: {field!r} is no number") from error


def _size(field: bytes) -> int:
    size = _number(field)
    if size < 0:
        raise DataLoss("the layer's tar is corrupt: a negative size in a header")
    return size


def _name(fields: tuple[bytes, ...]) -> str:
    prefix = _text(fields[15]) if fields[9] == _USTAR_MAGIC else ""
    return f"{prefix}/{_text(fields[0])}" if prefix else _text(fields[0])


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode(errors="surrogateescape")


def _decode(value: bytes | None) -> str | None:
    return None if value is None else _text(value)


def _parse_pax(data: bytes) -> dict[str, bytes]:
    r"""Records ``<length> <key>=<value>\n``, the length that of the whole record (POSIX, pax)."""
    records = {}
    at = 0
    while at < len(data):
        space = data.find(b" ", at, at + 20)
        digits = data[at:space]
        if space < 0 or not digits.isdigit():
            if not data[at:].strip(b"\0"):
                break
            raise DataLoss("the layer's tar is corrupt: a pax record without length")
        end = at + int(digits)
        key, equals, value = data[space + 1 : end - 1].partition(b"=")
        if not space < end <= len(data) or data[end - 1 : end] != b"\n" or not equals:
            raise DataLoss("the layer's tar is corrupt: a pax record of a wrong length")
        name = key.decode(errors="surrogateescape")
        if b"\0" in key or (b"\0" in value and not name.startswith(XATTR_PREFIX)):
            raise DataLoss(f"the layer's tar is corrupt: NUL in pax record {name!r}")
        records[name] = value
        at = end
    return records


def _pax_number(value: bytes) -> int:
    if not value.isdigit() or len(value) > 19:
        raise DataLoss(f"the layer's tar is corrupt: {value[:32]!r} is no number")
    return int(value)


def _pax_time(value: bytes) -> int:
    """Decimal seconds with any number of digits behind the point, as nanoseconds."""
    seconds, _, fraction = value.partition(b".")
    digits = seconds.removeprefix(b"-")
    if not digits.isdigit() or len(digits) > 12 or (fraction and not fraction.isdigit()):
        raise DataLoss(f"the layer's tar is corrupt: {value[:32]!r} is no time")
    nanoseconds = int(digits) * _NS + int(fraction[:9].ljust(9, b"0"))
    return -nanoseconds if seconds.startswith(b"-") else nanoseconds
