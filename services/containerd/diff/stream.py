"""A layer's bytes: decompressed and hashed in a thread of their own, taken up piece by piece.

Decompression and hashing hold no GIL, so on two processors they cost the reader nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import queue
import threading
from typing import IO, TYPE_CHECKING

import zstandard
from isal import igzip_lib

from services.common.errors import DataLoss, ResourceExhausted

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType
    from typing import Self

    from services.containerd.diff.limits import Limits

_PIECE_BYTES = 512 << 10
_PIECES_AHEAD = 8
_ROOM_S = 0.05
_GZIP_MAGIC = b"\x1f\x8b"
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"  # RFC 8878, 3.1.1


class LayerStream:
    """The uncompressed tar in a file that may be compressed with gzip or zstd, or not at all.

    Which it is, is seen from its first bytes: media types have been wrong about that before. Use
    as a context manager; ``digest`` and ``size_bytes`` are right after ``drain``.
    """

    def __init__(self, file: IO[bytes], limits: Limits) -> None:
        self._file = file
        self._limits = limits
        self._hash = hashlib.sha256()
        self.size_bytes = 0
        self._piece = b""
        self._at = 0
        self._queue: queue.Queue[bytes | BaseException] = queue.Queue(_PIECES_AHEAD)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._produce, name="layer-stream", daemon=True)

    @property
    def digest(self) -> str:
        """Digest of all bytes: the layer's diff id."""
        return f"sha256:{self._hash.hexdigest()}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stopped.set()
        while self._thread.is_alive():
            with contextlib.suppress(queue.Empty):  # it may be waiting for room
                while True:
                    self._queue.get_nowait()
            self._thread.join(_ROOM_S)

    def read(self, length: int) -> bytes:
        """Exactly ``length`` bytes, or fewer if the stream ends."""
        at = self._at
        found = self._piece[at : at + length]
        self._at = at + len(found)
        while len(found) < length and self._next():
            more = self._piece[: length - len(found)]
            self._at = len(more)
            found += more
        return found

    def copy(self, length: int, fd: int) -> int:
        """Write the next ``length`` bytes to ``fd``; returns how many there were."""
        left = length
        while left:
            available = len(self._piece) - self._at
            if not available:
                if not self._next():
                    break
                continue
            count = min(left, available)
            with memoryview(self._piece)[self._at : self._at + count] as view:
                written = os.write(fd, view)
            self._at += written
            left -= written
        return length - left

    def skip(self, length: int) -> int:
        """Pass over the next ``length`` bytes; returns how many there were."""
        left = length
        while left:
            count = min(left, len(self._piece) - self._at)
            self._at += count
            left -= count
            if left and not self._next():
                break
        return length - left

    def drain(self) -> None:
        """Pass over what is left."""
        while self._next():
            pass

    def _next(self) -> bool:
        self._at = 0
        item = self._queue.get()
        if isinstance(item, BaseException):
            self._queue.put(item)
            raise item
        self._piece = item
        if not item:
            self._queue.put(b"")  # the end stays the end
        return bool(item)

    def _produce(self) -> None:
        try:
            for piece in self._pieces():
                if self._stopped.is_set():
                    return
                self._hash.update(piece)
                self.size_bytes += len(piece)
                if self.size_bytes > self._limits.stream_bytes:
                    raise ResourceExhausted(
                        f"the layer has more than {self._limits.stream_bytes} bytes uncompressed"
                    )
                self._queue.put(piece)
            self._queue.put(b"")
        except BaseException as error:
            self._queue.put(error)

    def _pieces(self) -> Iterator[bytes]:
        first = self._file.read(4)
        self._file.seek(0)
        if first.startswith(_GZIP_MAGIC):
            return _gunzip(self._file)
        if first == _ZSTD_MAGIC or (first and _is_skippable(first)):
            return _unzstd(self._file, self._limits.window_bytes)
        return iter(lambda: self._file.read(_PIECE_BYTES), b"")


def _gunzip(file: IO[bytes]) -> Iterator[bytes]:
    """All members of a gzip file (RFC 1952, 2.2); zeros behind one are padding."""
    data = file.read(_PIECE_BYTES)
    while data:
        member = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP)
        while not member.eof:
            if member.needs_input and not data:
                data = file.read(_PIECE_BYTES)
                if not data:
                    raise DataLoss("the layer's gzip stream is cut short")
            try:
                piece = member.decompress(data, _PIECE_BYTES)
            except igzip_lib.error as error:  # type: ignore[misc]  # its stub says: an instance
                raise DataLoss(f"the layer's gzip stream is corrupt: {error}") from error
            data = b""
            if piece:
                yield piece
        data = member.unused_data.lstrip(b"\0")
        while not data and (more := file.read(_PIECE_BYTES)):
            data = more.lstrip(b"\0")


def _unzstd(file: IO[bytes], window_bytes: int) -> Iterator[bytes]:
    """All frames of a zstd file (RFC 8878, 3.1)."""
    while magic := file.read(4):
        if magic == _ZSTD_MAGIC:
            yield from _unzstd_frame(file, window_bytes)
        elif _is_skippable(magic):
            length = int.from_bytes(_exactly(file, 4), "little")
            for begin in range(0, length, _PIECE_BYTES):
                _exactly(file, min(_PIECE_BYTES, length - begin))
        else:
            raise DataLoss("the layer's zstd stream is corrupt: there is no frame where one begins")


def _unzstd_frame(file: IO[bytes], window_bytes: int) -> Iterator[bytes]:
    """One frame, block by block: a block gives 128 KiB at most, whatever its compressed size."""
    descriptor = _exactly(file, 1)
    single_segment = descriptor[0] >> 5 & 1
    content_size = (single_segment, 2, 4, 8)[descriptor[0] >> 6]
    header = _exactly(file, 1 - single_segment + (0, 1, 2, 4)[descriptor[0] & 3] + content_size)
    frame = zstandard.ZstdDecompressor(max_window_size=window_bytes).decompressobj()
    try:
        frame.decompress(_ZSTD_MAGIC + descriptor + header)
        last = False
        while not last:
            block = _exactly(file, 3)
            last = bool(block[0] & 1)
            size = int.from_bytes(block, "little") >> 3
            is_run = block[0] >> 1 & 3 == 1
            if piece := frame.decompress(block + _exactly(file, 1 if is_run else size)):
                yield piece
        if descriptor[0] & 4:
            frame.decompress(_exactly(file, 4))
    except zstandard.ZstdError as error:
        raise DataLoss(f"the layer's zstd stream is corrupt: {error}") from error


def _is_skippable(magic: bytes) -> bool:
    return magic[1:] == b"\x2a\x4d\x18" and magic[0] >> 4 == 5  # RFC 8878, 3.1.2


def _exactly(file: IO[bytes], length: int) -> bytes:
    data = file.read(length)
    if len(data) < length:
        raise DataLoss("the layer's zstd stream is cut short")
    return data
