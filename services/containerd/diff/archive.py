"""Changes written as a layer's tar (OCI image-spec, layer.md), the same bytes for the same changes.

ustar with pax records where ustar has no room: long names, large numbers, attributes. Times are
whole seconds, and there are no names of users, as upstream writes it.
"""

from __future__ import annotations

import os
import stat
import struct
from typing import TYPE_CHECKING, Protocol

from services.common.errors import FailedPrecondition
from services.containerd.diff import reader
from services.containerd.diff.attributes import kept_attributes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from services.containerd.diff.changes import Change

_BLOCK_BYTES = 512
_COPIED_BYTES = 1 << 20
_NS = 1_000_000_000
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_HEADER = struct.Struct("100s8s8s8s12s12s8sc100s8s32s32s8s8s155s12x")
_PAX = b"x"
_KINDS = {
    stat.S_IFREG: reader.REGULAR,
    stat.S_IFDIR: reader.DIRECTORY,
    stat.S_IFLNK: reader.SYMLINK,
    stat.S_IFCHR: reader.CHARACTER,
    stat.S_IFBLK: reader.BLOCK,
    stat.S_IFIFO: reader.FIFO,
}


class Output(Protocol):
    """Takes the bytes of a tar."""

    def write(self, data: bytes, /) -> object:
        """Take all of ``data``."""


class LayerWriter:
    """Writes changes to ``output``; ``close`` writes the end of the tar.

    Args:
        output: takes the uncompressed tar.
        newest_ns: times past this one are set back to it; None leaves them.
    """

    def __init__(self, output: Output, *, newest_ns: int | None = None) -> None:
        self._output = output
        self._newest_ns = newest_ns
        self._links: dict[tuple[int, int], str] = {}

    def add(self, change: Change) -> None:
        """Write one change. Sockets are no part of a layer."""
        if change.status is None:
            above = change.name.removesuffix(change.base)
            self._whiteout(f"{above}.wh.{change.base}")
            return
        kind = _KINDS.get(stat.S_IFMT(change.status.st_mode))
        if kind is None:
            return
        if kind != reader.DIRECTORY and self._is_link(change, change.status):
            return
        if kind == reader.REGULAR:
            self._add_file(change, change.status)
            return
        link = ""
        if kind == reader.SYMLINK:
            link = os.readlink(change.base, dir_fd=change.directory_fd)
        xattrs = kept_attributes(change.directory_fd, change.base)
        name = f"{change.name}/" if kind == reader.DIRECTORY else change.name
        self._header(name, kind, change.status, link=link, xattrs=xattrs)
        if change.opaque:
            self._whiteout(f"{name}.wh..wh..opq")

    def close(self) -> None:
        """Write the end mark, two blocks of zeros."""
        self._output.write(bytes(2 * _BLOCK_BYTES))

    def _is_link(self, change: Change, status: os.stat_result) -> bool:
        """Write a further name of what has been written, of any kind; or remember its first."""
        inode = (status.st_dev, status.st_ino)
        if status.st_nlink == 1:
            return False
        if inode not in self._links:
            self._links[inode] = change.name
            return False
        self._header(change.name, reader.HARDLINK, status, link=self._links[inode])
        return True

    def _add_file(self, change: Change, status: os.stat_result) -> None:
        fd = os.open(change.base, _FILE, dir_fd=change.directory_fd)
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise FailedPrecondition(f"{change.name!r} was replaced while it was read")
            self._header(
                change.name,
                reader.REGULAR,
                status,
                size_bytes=status.st_size,
                xattrs=kept_attributes(change.directory_fd, change.base),
            )
            left = status.st_size
            while left and (piece := os.read(fd, min(left, _COPIED_BYTES))):
                self._output.write(piece)
                left -= len(piece)
        finally:
            os.close(fd)
        if left:
            raise FailedPrecondition(f"{change.name!r} was cut short while it was read")
        self._output.write(bytes(-status.st_size % _BLOCK_BYTES))

    def _whiteout(self, name: str) -> None:
        nobody = os.stat_result((stat.S_IFREG, 0, 0, 1, 0, 0, 0, 0, 0, 0))
        self._header(name, reader.REGULAR, nobody)

    def _header(
        self,
        name: str,
        kind: bytes,
        status: os.stat_result,
        *,
        link: str = "",
        size_bytes: int = 0,
        xattrs: Mapping[str, bytes] | None = None,
    ) -> None:
        mtime_ns = int(status.st_mtime) * _NS
        if self._newest_ns is not None:
            mtime_ns = min(mtime_ns, self._newest_ns)
        device = (0, 0)
        if kind in (reader.CHARACTER, reader.BLOCK):
            device = (os.major(status.st_rdev), os.minor(status.st_rdev))
        pax: dict[str, bytes] = {}
        fields = (
            _field(os.fsencode(name), 100, "path", pax),
            _number(stat.S_IMODE(status.st_mode), 8, "", pax),
            _number(status.st_uid, 8, "uid", pax),
            _number(status.st_gid, 8, "gid", pax),
            _number(size_bytes, 12, "size", pax),
            _number(mtime_ns // _NS, 12, "mtime", pax),
        )
        rest = (
            kind,
            _field(os.fsencode(link), 100, "linkpath", pax),
            b"ustar\x0000",
            b"",
            b"",
            _number(device[0], 8, "SCHILY.devmajor", pax),
            _number(device[1], 8, "SCHILY.devminor", pax),
            b"",
        )
        pax |= {reader.XATTR_PREFIX + key: value for key, value in (xattrs or {}).items()}
        if pax:
            records = b"".join(_record(key, pax[key]) for key in sorted(pax))
            size = b"%011o\0" % len(records)
            zero = b"%07o\0" % 0
            head = (b"PaxHeaders/entry", b"%07o\0" % 0o644, zero, zero, size, b"%011o\0" % 0)
            self._output.write(_block(head, (_PAX, b"", b"ustar\x0000", b"", b"", zero, zero, b"")))
            self._output.write(records + bytes(-len(records) % _BLOCK_BYTES))
        self._output.write(_block(fields, rest))


def _block(fields: tuple[bytes, ...], rest: tuple[bytes, ...]) -> bytes:
    checksum = b"%06o\0 " % sum(_HEADER.pack(*fields, b" " * 8, *rest))
    return _HEADER.pack(*fields, checksum, *rest)


def _field(value: bytes, length: int, key: str, pax: dict[str, bytes]) -> bytes:
    """A text, in the pax records as well where it has no room or is not ASCII."""
    if len(value) > length or not value.isascii():
        pax[key] = value
    return value[:length]


def _number(value: int, length: int, key: str, pax: dict[str, bytes]) -> bytes:
    """Octal digits, or in the pax records where they have no room."""
    if 0 <= value < 8 ** (length - 1):
        return b"%0*o\0" % (length - 1, value)
    pax[key] = b"%d" % value
    return b"0" * (length - 1) + b"\0"


def _record(key: str, value: bytes) -> bytes:
    body = b" " + key.encode(errors="surrogateescape") + b"=" + value + b"\n"
    length = len(body)
    while len(b"%d" % length) + len(body) != length:
        length = len(b"%d" % length) + len(body)
    return b"%d" % length + body
