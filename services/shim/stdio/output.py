"""The output of one process as one sequence of bytes, for any number of attached readers.

Both streams are numbered together, in the order in which the shim read them: a single offset says
how far a reader has come. The newest bytes are in memory. Where there is a log, older ones are read
back from it, so a slow reader holds up nobody; but bytes that are no UTF-8 cannot be had from a log
of JSON, so as moby does the process waits for whoever is attached and has not read them yet, once
``AHEAD_MAX_BYTES`` of memory are full of them. Where there is no log, the process waits for the
slowest reader: reading from the pipe stops while more than ``AHEAD_MAX_BYTES`` are unread. Bytes
that were handed to a reader stay for a while (``HISTORY_BYTES``), because what was under way when a
connection broke is asked for again. Once the last reader is gone the process waits for
``RECONNECT_GRACE_S``, as it does from its start for the first one; then the oldest bytes are
dropped, and who comes later finds a gap.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, Self

from services.common.errors import OutOfRange
from services.common.frozen import frozen
from services.shim.handover import data_of
from services.shim.stdio import log_reader
from services.shim.stdio.extents import Extents

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from services.shim.handover import Outgoing
    from services.shim.stdio.log_writer import LogWriter

PIECE_MAX_BYTES = 256 << 10
AHEAD_MAX_BYTES = 1 << 20
HISTORY_BYTES = 3 << 20
LOGGED_RING_BYTES = 512 << 10
RECONNECT_GRACE_S = 30.0

# Small writes of one stream are joined; what a chunk costs beside its bytes is counted too.
_JOIN_MAX_BYTES = 16384
_CHUNK_COST_BYTES = 160


@frozen
class Piece:
    """Bytes of one stream at their offset."""

    offset: int
    stream: str
    data: bytes


@frozen
class Gap:
    """Bytes from ``start`` up to ``end`` that cannot be had any more."""

    start: int
    end: int


@dataclass(slots=True)
class _Chunk:
    offset: int
    stream: str
    stream_end: int
    data: bytes | bytearray = field(repr=False)
    is_text: bool | None = None  # None: not looked at yet


class Output:
    """What a process wrote; the event loop's thread only.

    Args:
        log: where everything is written as well, or None.
        streams: number of streams that have to finish.
        dropped: called with a stream and the bytes of it that nobody read and nobody can.
        handed: called with the offset up to which some reader has got the output.
    """

    def __init__(
        self,
        log: LogWriter | None,
        *,
        streams: int,
        dropped: Callable[[str, int], None] = lambda _stream, _count: None,
        handed: Callable[[int], None] = lambda _offset: None,
    ) -> None:
        self._handed = handed
        self.end = 0
        self.finished = False
        self._log = log
        self._unfinished = streams
        self._dropped = dropped
        self._chunks: deque[_Chunk] = deque()
        self._first_chunk = 0
        self._held_bytes = 0
        self._stream_ends: dict[str, int] = {}
        self._extents = Extents() if log is not None else None
        self._readers: set[OutputReader] = set()
        self._read_until = 0
        self._dropping = False
        self._keeping = False  # what no log can give back
        self._grace: asyncio.TimerHandle | None = None
        self._ready_callbacks: list[Callable[[], None]] = []
        self._loop = asyncio.get_running_loop()
        if log is None:
            self._start_grace()

    @property
    def start(self) -> int:
        """Offset of the oldest byte in memory."""
        return self._chunks[0].offset if self._chunks else self.end

    @property
    def ready(self) -> bool:
        """Whether the process may write on."""
        if self._log is not None:
            return self._log.ready and not self._full
        return self._dropping or self.end - self._floor() < AHEAD_MAX_BYTES

    @property
    def abandoned(self) -> bool:
        """Whether nobody reads and nothing keeps what nobody reads."""
        return self._log is None and not self._readers

    def when_ready(self, callback: Callable[[], None]) -> None:
        """See :meth:`Sink.when_ready`."""
        if self._log is not None and not self._full:
            self._log.when_ready(callback)
        elif self.ready:
            self._loop.call_soon(callback)
        else:
            self._ready_callbacks.append(callback)

    def write(self, stream: str, data: bytes) -> None:
        """Add output."""
        stream_start = self._stream_ends.get(stream, 0)
        self._stream_ends[stream] = stream_start + len(data)
        if self._extents is not None:
            self._extents.add(self.end, stream, stream_start)
        self._add_chunk(stream, data)
        self.end += len(data)
        if self._log is not None:
            self._log.write(stream, data)
        self._evict()
        self._wake_readers()

    def finish(self, stream: str) -> None:
        """Note that a stream ended; with the last one the output is complete."""
        self._unfinished -= 1
        if self._log is not None:
            self._log.finish(stream)
        if self._unfinished <= 0:
            self._complete()

    async def settle(self) -> None:
        """Wait until the log has what was written."""
        if self._log is not None:
            await self._log.settle()

    async def close(self) -> None:
        """No more output comes; readers go on to the end of what there is."""
        self._complete()
        self._stop_grace()
        if self._log is not None:
            await self._log.close()

    def pack(self, out: Outgoing) -> dict[str, Any]:
        """What the next image of the shim goes on with, the log's part included."""
        grace_s = self._grace.when() - self._loop.time() if self._grace is not None else None
        return {
            "kind": "output",
            "end": self.end,
            "finished": self.finished,
            "unfinished": self._unfinished,
            "stream_ends": self._stream_ends,
            "read_until": self._read_until,
            "dropping": self._dropping,
            "grace_s": grace_s,
            "extents": self._extents.pack() if self._extents is not None else None,
            "chunks": [
                (chunk.offset, chunk.stream, chunk.stream_end, out.data(chunk.data))
                for chunk in self._chunks
            ],
            "log": self._log.pack(out) if self._log is not None else None,
        }

    @classmethod
    def unpack(
        cls,
        saved: Mapping[str, Any],
        log: LogWriter | None,
        *,
        dropped: Callable[[str, int], None] = lambda _stream, _count: None,
        handed: Callable[[int], None] = lambda _offset: None,
    ) -> Self:
        """The output that was packed; nobody is attached to it."""
        output = cls(log, streams=saved["unfinished"], dropped=dropped, handed=handed)
        output.end = saved["end"]
        output.finished = saved["finished"]
        output._stream_ends = dict(saved["stream_ends"])
        output._read_until = saved["read_until"]
        output._dropping = saved["dropping"]
        if log is not None:
            output._extents = Extents.unpack(saved["extents"] or ())
        for offset, stream, stream_end, text in saved["chunks"]:
            data = data_of(text)
            output._chunks.append(_Chunk(offset, stream, stream_end, data))
            output._held_bytes += len(data) + _CHUNK_COST_BYTES
        if output.finished or output._dropping:
            output._stop_grace()
        elif log is None and saved["grace_s"] is not None:
            output._start_grace(saved["grace_s"])
        return output

    def attach(self, offset: int, *, from_end: bool, follow: bool) -> OutputReader:
        """A reader from ``offset`` on; the caller detaches it.

        Raises:
            OutOfRange: the offset is past the end.
        """
        if from_end:
            offset = self.end
        if offset > self.end:
            raise OutOfRange(f"offset {offset} is past the end of the output, {self.end}")
        reader = OutputReader(self, offset, until=None if follow else self.end)
        self._readers.add(reader)
        self._stop_grace()
        self._dropping = False
        return reader

    def detach(self, reader: OutputReader) -> None:
        """Forget a reader; the last one starts the grace time."""
        self._readers.discard(reader)
        if self._log is None and not self._readers and not self.finished:
            self._start_grace()
        self._call_ready()

    def advanced(self, offset: int) -> None:
        """Note that a reader came to ``offset``."""
        self._read_until = max(self._read_until, offset)
        self._handed(self._read_until)
        self._call_ready()

    def piece_at(self, offset: int, chunk_number: int, limit: int) -> tuple[Piece, int]:
        """The piece in memory at ``offset``, and the number of its chunk, a hint for the next."""
        number = max(chunk_number, self._first_chunk)
        index = number - self._first_chunk
        for chunk in islice(self._chunks, index, None):
            if chunk.offset + len(chunk.data) > offset:
                begin = offset - chunk.offset
                data = bytes(chunk.data[begin : begin + min(limit, PIECE_MAX_BYTES)])
                return Piece(offset, chunk.stream, data), number
            number += 1
        raise AssertionError("offset is not in memory")

    async def piece_from_log(self, offset: int, limit: int, ahead: ReadAhead) -> Piece | Gap:
        """The piece at ``offset``, which is not in memory any more.

        Args:
            offset: below :attr:`start`.
            limit: most bytes wanted.
            ahead: what the reader has got from the log already; more is put there.
        """
        if self._log is None or self._extents is None:
            return Gap(offset, self.start)
        extent = self._extents.find(offset)
        if extent is None:
            return Gap(offset, min(self._extents.first_offset(self.start), self.start))
        length = min(extent.end or self.start, self.start) - offset
        at = extent.stream_start + offset - extent.start
        data = ahead.take(extent.stream, at, min(length, limit))
        if not data:
            found, following = await asyncio.to_thread(
                log_reader.read, self._log, extent.stream, at, PIECE_MAX_BYTES
            )
            if not found:
                return Gap(offset, offset + max(1, min(length, following - at)))
            ahead.keep(extent.stream, at, found)
            data = found[: min(length, limit)]
        return Piece(offset, extent.stream, data)

    def _add_chunk(self, stream: str, data: bytes) -> None:
        last = self._chunks[-1] if self._chunks else None
        self._held_bytes += len(data)
        if (
            last is not None
            and last.stream == stream
            and len(last.data) + len(data) <= _JOIN_MAX_BYTES
        ):
            if isinstance(last.data, bytes):
                last.data = bytearray(last.data)
            last.data += data
            last.is_text = None
            last.stream_end += len(data)
            return
        self._held_bytes += _CHUNK_COST_BYTES
        self._chunks.append(_Chunk(self.end, stream, self._stream_ends[stream], data))

    def _evict(self) -> None:
        limit = self._limit()
        while self._chunks and self._held_bytes > limit:
            oldest = self._chunks[0]
            if self._log is not None and not self._is_logged(oldest):
                return
            self._keeping = self._log is not None and self._is_only_here(oldest)
            if self._keeping:
                return
            if self._log is None and not self._dropping and self._is_unread(oldest):
                return
            if self._log is None and self._is_unread(oldest):
                self._dropped(oldest.stream, len(oldest.data))
            self._chunks.popleft()
            self._first_chunk += 1
            self._held_bytes -= len(oldest.data) + _CHUNK_COST_BYTES

    @property
    def _full(self) -> bool:
        return self._keeping and self._held_bytes > LOGGED_RING_BYTES + AHEAD_MAX_BYTES

    def _is_only_here(self, chunk: _Chunk) -> bool:
        """Whether somebody is attached who has yet to read what the log cannot give back."""
        if not self._readers or not self._is_unread(chunk):
            return False
        if chunk.is_text is None:
            # A character that two chunks share makes both no text: they are kept a little longer.
            chunk.is_text = _is_text(chunk.data)
        return not chunk.is_text

    def _limit(self) -> int:
        if self._log is not None:
            return LOGGED_RING_BYTES
        return AHEAD_MAX_BYTES if self._dropping else AHEAD_MAX_BYTES + HISTORY_BYTES

    def _is_logged(self, chunk: _Chunk) -> bool:
        assert self._log is not None
        return chunk.stream_end <= self._log.index[chunk.stream].written

    def _is_unread(self, chunk: _Chunk) -> bool:
        return chunk.offset + len(chunk.data) > self._floor()

    def _floor(self) -> int:
        """Offset from which on bytes in memory are unread."""
        if self._readers:
            return max(self.start, min(reader.offset for reader in self._readers))
        return max(self.start, self._read_until)

    def _complete(self) -> None:
        self.finished = True
        self._wake_readers()

    def _wake_readers(self) -> None:
        for reader in self._readers:
            reader.wake()

    def _start_grace(self, grace_s: float | None = None) -> None:
        self._stop_grace()
        grace_s = RECONNECT_GRACE_S if grace_s is None else grace_s
        self._grace = self._loop.call_later(max(0.0, grace_s), self._end_grace)

    def _stop_grace(self) -> None:
        if self._grace is not None:
            self._grace.cancel()
            self._grace = None

    def _end_grace(self) -> None:
        self._dropping = True
        self._evict()
        self._call_ready()

    def _call_ready(self) -> None:
        if self._keeping:
            self._evict()
        if self._ready_callbacks and not self._full and (self._log is not None or self.ready):
            callbacks, self._ready_callbacks = self._ready_callbacks, []
            for callback in callbacks:
                if self._log is not None:
                    self._log.when_ready(callback)
                else:
                    callback()


def _is_text(data: bytes | bytearray) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


class ReadAhead:
    """One stretch of each stream that was read from a log, for the pieces to come.

    Streams that take turns at every line are found again in many small pieces, all of them in the
    same stretches.
    """

    def __init__(self) -> None:
        self._stretches: dict[str, tuple[int, bytes]] = {}

    def keep(self, stream: str, offset: int, data: bytes) -> None:
        """Keep ``data``, which begins at ``offset`` of a stream, instead of what was kept."""
        self._stretches[stream] = (offset, data)

    def take(self, stream: str, offset: int, limit: int) -> bytes:
        """Bytes of a stream at ``offset``; empty when they are not here."""
        start, data = self._stretches.get(stream, (0, b""))
        return data[offset - start : offset - start + limit] if offset >= start else b""


class OutputReader:
    """One attached reader: an offset that advances as it reads."""

    def __init__(self, output: Output, offset: int, *, until: int | None) -> None:
        self.offset = offset
        self._output = output
        self._until = until
        self._chunk_number = 0
        self._ahead = ReadAhead()
        self._wake = asyncio.Event()

    async def read(self) -> Piece | Gap | None:
        """The next piece or gap; None at the end. Waits for output that is not there yet."""
        while self.offset >= self._end():
            if self._until is not None or self._output.finished:
                return None
            self._wake.clear()
            await self._wake.wait()
        limit = self._end() - self.offset
        found: Piece | Gap
        if self.offset >= self._output.start:
            found, self._chunk_number = self._output.piece_at(
                self.offset, self._chunk_number, limit
            )
        else:
            found = await self._output.piece_from_log(self.offset, limit, self._ahead)
        return found

    def advance(self, found: Piece | Gap) -> None:
        """Note that what ``read`` gave was passed on."""
        self.offset = found.end if isinstance(found, Gap) else found.offset + len(found.data)
        self._output.advanced(self.offset)

    def wake(self) -> None:
        """Look for more output."""
        self._wake.set()

    def close(self) -> None:
        """Detach."""
        self._output.detach(self)

    def _end(self) -> int:
        return self._output.end if self._until is None else self._until
