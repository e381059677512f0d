"""A log file and the thread that writes it, so that a slow disk never stops the event loop.

The event loop queues what it read; the thread takes all that is queued, formats it, and appends it.
Past a bound in the queue the sink is not ready, and the container waits. Files rotate by size as
docker's do: ``name`` is the newest, then ``name.1`` and so on; a file is closed at the first line
that reaches the size. A disk that is full drops lines and counts them, or, when the container was
so configured, lets it wait; the file is cut back to its last whole line either way.

For Streams.Attach the thread keeps an index: at which place of which file a stream's bytes lie
(see ``log_reader.py``).
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from bisect import bisect_right
from collections import deque
from dataclasses import astuple, dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, Self

import structlog

from services.common.errors import FailedPrecondition
from services.shim.futures import finish
from services.shim.handover import data_of
from services.shim.stdio import json_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from services.shim.handover import Outgoing

log = structlog.get_logger(__name__)

QUEUE_MAX_BYTES = 4 << 20
INDEX_DISTANCE_BYTES = 256 << 10
PLACES_MAX = 4096
_RETRY_S = 1.0
_TORN_PIECE_BYTES = 65536
_LOG_FILE_MODE = 0o640


@dataclass(frozen=True, slots=True)
class Place:
    """Where a stretch of a stream begins in the log.

    Attributes:
        offset: of its first byte in the stream.
        generation: number of the file, counted from the first.
        position: in that file; the line there, or one after it, is the stream's.
        lossy: the stretch cannot be read back: dropped, or not UTF-8.
    """

    offset: int
    generation: int
    position: int
    lossy: bool


@dataclass(slots=True)
class StreamIndex:
    """Places of one stream in order, and how much of it is in the file."""

    written: int = 0
    places: list[Place] = field(default_factory=list)
    distance: int = INDEX_DISTANCE_BYTES

    def add(self, place: Place) -> None:
        """Note a place, unless the last one is near and of the same kind."""
        last = self.places[-1] if self.places else None
        if (
            last is None
            or last.generation != place.generation
            or last.lossy != place.lossy
            or place.offset - last.offset >= self.distance
        ):
            self.places.append(place)
            if len(self.places) > PLACES_MAX:
                self._thin()

    def find(self, offset: int) -> tuple[Place | None, int]:
        """The last place at or before ``offset``, and the offset where its stretch ends."""
        number = bisect_right(self.places, offset, key=lambda place: place.offset)
        end = self.places[number].offset if number < len(self.places) else self.written
        return (self.places[number - 1] if number else None), end

    def pack(self) -> dict[str, Any]:
        """The index as plain data, for :meth:`unpack`."""
        places = [astuple(place) for place in self.places]
        return {"written": self.written, "distance": self.distance, "places": places}

    @classmethod
    def unpack(cls, saved: Mapping[str, Any]) -> Self:
        """The index that was packed."""
        places = [Place(*place) for place in saved["places"]]
        return cls(saved["written"], places, saved["distance"])

    def _thin(self) -> None:
        """Forget every second place that is of the same kind as the one before it."""
        self.distance *= 2
        kept = [self.places[0]]
        skipped = False
        for place in self.places[1:]:
            last = kept[-1]
            alike = (last.generation, last.lossy) == (place.generation, place.lossy)
            if alike and not skipped:
                skipped = True
                continue
            skipped = False
            kept.append(place)
        self.places = kept


@dataclass(frozen=True, slots=True)
class Chunk:
    """Formatted output that must not be torn apart except between lines.

    Attributes:
        raw: what it stands for.
        data: what to write.
        lossy: see Place.
        lines: whether every newline of ``raw`` ends one line of ``data``.
    """

    raw: bytes
    data: bytes
    lossy: bool
    lines: bool


class Format(Protocol):
    """Turns one process' output into what is written.

    Attributes:
        lines: whether a file of it consists of whole lines.
    """

    lines: bool

    def feed(self, stream: str, data: bytes, time_ns: int) -> Iterator[Chunk]:
        """Chunks that are complete after ``data``."""
        ...

    def finish(self, stream: str, time_ns: int) -> Iterator[Chunk]:
        """What was left of a stream."""
        ...

    def unfinished(self) -> dict[str, bytes]:
        """By stream, what was fed and not given back yet: an unfinished line."""
        ...

    def resume(self, unfinished: Mapping[str, bytes]) -> None:
        """Go on where another object, which ``unfinished`` is from, was."""
        ...


class JsonFileFormat:
    """docker's json-file lines."""

    lines = True

    def __init__(self) -> None:
        self._splitters: dict[str, json_file.LineSplitter] = {}

    def feed(self, stream: str, data: bytes, time_ns: int) -> Iterator[Chunk]:
        """See :meth:`Format.feed`."""
        splitter = self._splitters.setdefault(stream, json_file.LineSplitter())
        return self._format(splitter.feed(data), stream, time_ns)

    def finish(self, stream: str, time_ns: int) -> Iterator[Chunk]:
        """See :meth:`Format.finish`."""
        splitter = self._splitters.setdefault(stream, json_file.LineSplitter())
        return self._format(splitter.finish(), stream, time_ns)

    def unfinished(self) -> dict[str, bytes]:
        """See :meth:`Format.unfinished`."""
        return {stream: splitter.rest for stream, splitter in self._splitters.items()}

    def resume(self, unfinished: Mapping[str, bytes]) -> None:
        """See :meth:`Format.resume`."""
        for stream, rest in unfinished.items():
            self._splitters.setdefault(stream, json_file.LineSplitter()).rest = rest

    def _format(self, runs: Iterator[json_file.Run], stream: str, time_ns: int) -> Iterator[Chunk]:
        timestamp = json_file.format_time(time_ns)
        for run in runs:
            formatted = json_file.format_run(run, stream, timestamp)
            yield Chunk(run.raw, formatted.data, formatted.lossy, run.whole)


class RawFormat:
    """The bytes as they came."""

    lines = False

    def feed(self, stream: str, data: bytes, time_ns: int) -> Iterator[Chunk]:
        """See :meth:`Format.feed`."""
        del stream, time_ns
        yield Chunk(data, data, lossy=True, lines=False)

    def finish(self, stream: str, time_ns: int) -> Iterator[Chunk]:
        """See :meth:`Format.finish`."""
        del stream, time_ns
        yield from ()

    def unfinished(self) -> dict[str, bytes]:
        """See :meth:`Format.unfinished`: nothing is kept back."""
        return {}

    def resume(self, unfinished: Mapping[str, bytes]) -> None:
        """See :meth:`Format.resume`."""


@dataclass(frozen=True, slots=True)
class _Item:
    stream: str
    data: bytes | None
    time_ns: int


class LogWriter:
    """One log file; a :class:`~services.shim.stdio.sink.Sink`.

    Args:
        path: the newest file; appended to when it exists.
        form: how lines look.
        max_size_bytes: size at which a new file begins; 0: never.
        max_files: files kept.
        block_on_full: wait for space instead of dropping.
        dropped: called in the event loop with a stream and the bytes of it that were dropped.
        saved: what :meth:`pack` gave in an earlier image of the shim, to go on with.
        wrote: called in the writing thread with a stream and how much of it is in the log.

    Raises:
        FailedPrecondition: the file cannot be opened.
    """

    def __init__(
        self,
        path: Path,
        form: Format,
        *,
        max_size_bytes: int = 0,
        max_files: int = 1,
        block_on_full: bool = False,
        dropped: Callable[[str, int], None] = lambda _stream, _count: None,
        saved: Mapping[str, Any] | None = None,
        wrote: Callable[[str, int], None] = lambda _stream, _count: None,
    ) -> None:
        self._wrote = wrote
        self.path = path
        self.generation = 0  # guarded by file_lock
        self.oldest_generation = 0  # guarded by file_lock
        self.file_lock = threading.Lock()
        self.index = {name: StreamIndex() for name in ("stdout", "stderr")}  # guarded by file_lock
        self._format = form
        self._max_size_bytes = max_size_bytes
        self._max_files = max_files
        self._block_on_full = block_on_full
        self._dropped = dropped
        self._loop = asyncio.get_running_loop()
        self._condition = threading.Condition()
        self._queue: deque[_Item] = deque()  # guarded by _condition
        self._queued_bytes = 0  # guarded by _condition
        self._stopping = False  # guarded by _condition
        self._reopen = False  # guarded by _condition
        self._idle = True  # guarded by _condition
        self._stuck = False
        self._failing = False
        self._waiters: list[asyncio.Future[None]] = []
        self._callbacks: list[Callable[[], None]] = []
        self._thread: threading.Thread | None = None
        self._fd, self._size = self._open() if saved is None else self._resume(saved)

    def pack(self, out: Outgoing) -> dict[str, Any]:
        """What the next image of the shim goes on with; to be called once settled.

        Raises:
            FailedPrecondition: the disk is full and output waits for it.
        """
        with self._condition:
            if not self._idle:
                raise FailedPrecondition(f"output waits for space in log file {self.path}")
        with self.file_lock:
            return {
                "kind": "log",
                "fd": out.file(self._fd),
                "generation": self.generation,
                "oldest_generation": self.oldest_generation,
                "index": {name: index.pack() for name, index in self.index.items()},
                "unfinished": {
                    stream: out.data(rest) for stream, rest in self._format.unfinished().items()
                },
            }

    def _resume(self, saved: Mapping[str, Any]) -> tuple[int, int]:
        self.generation = saved["generation"]
        self.oldest_generation = saved["oldest_generation"]
        self.index = {name: StreamIndex.unpack(index) for name, index in saved["index"].items()}
        self._format.resume({stream: data_of(rest) for stream, rest in saved["unfinished"].items()})
        if saved["fd"] >= 0:
            return saved["fd"], os.fstat(saved["fd"]).st_size
        if self._format.lines:
            _cut_torn_line(self.path)
        return self._open()

    @property
    def ready(self) -> bool:
        """Whether the queue has room."""
        return self._queued_bytes < QUEUE_MAX_BYTES

    def when_ready(self, callback: Callable[[], None]) -> None:
        """See :meth:`Sink.when_ready`."""
        if self.ready:
            self._loop.call_soon(callback)
        else:
            self._callbacks.append(callback)

    def write(self, stream: str, data: bytes) -> None:
        """Queue output."""
        self._enqueue(_Item(stream, data, time.time_ns()))

    def finish(self, stream: str) -> None:
        """Queue the end of a stream: an unfinished line is written as it is."""
        self._enqueue(_Item(stream, None, time.time_ns()))

    def reopen(self) -> None:
        """Close the file and open its path again, after somebody moved it away."""
        with self._condition:
            self._reopen = True
            self._idle = False
            self._condition.notify()
        self._start_thread()

    async def settle(self) -> None:
        """Wait until the queue is written, or the disk is full."""
        with self._condition:
            if self._idle or self._stuck:
                return
            waiter: asyncio.Future[None] = self._loop.create_future()
            self._waiters.append(waiter)
        await waiter

    async def close(self) -> None:
        """Write what is queued, end the thread, close the file."""
        with self._condition:
            self._stopping = True
            self._condition.notify()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)
        os.close(self._fd)

    def _enqueue(self, item: _Item) -> None:
        with self._condition:
            self._queue.append(item)
            self._queued_bytes += len(item.data or b"")
            self._idle = False
            self._condition.notify()
        self._start_thread()

    def _start_thread(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="log-writer", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while True:
            with self._condition:
                while not (self._queue or self._stopping or self._reopen):
                    self._condition.wait()
                if not self._queue and not self._reopen:
                    return
                items = list(self._queue)
                self._queue.clear()
                reopen, self._reopen = self._reopen, False
            if reopen:
                self._reopen_file()
            for item in items:
                self._write_item(item)
            with self._condition:
                self._queued_bytes -= sum(len(item.data or b"") for item in items)
                self._idle = not self._queue and not self._reopen
            self._wake()

    def _wake(self) -> None:
        try:
            self._loop.call_soon_threadsafe(self._progress)
        except RuntimeError:  # the loop is closed: nobody waits
            return

    def _progress(self) -> None:
        if self.ready:
            callbacks, self._callbacks = self._callbacks, []
            for callback in callbacks:
                callback()
        with self._condition:
            if not self._idle and not self._stuck:
                return
            waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            finish(waiter, None)

    def _write_item(self, item: _Item) -> None:
        if item.data is None:
            chunks = self._format.finish(item.stream, item.time_ns)
        else:
            chunks = self._format.feed(item.stream, item.data, item.time_ns)
        for chunk in chunks:
            self._write_chunk(item.stream, chunk)

    def _write_chunk(self, stream: str, chunk: Chunk) -> None:
        while (split := self._split(chunk)) is not None:
            first, chunk = split
            self._append(stream, first)
            self._rotate()
        self._append(stream, chunk)

    def _split(self, chunk: Chunk) -> tuple[Chunk, Chunk] | None:
        """Cut a chunk behind the line with which the file reaches its size; None if none does."""
        if not self._max_size_bytes:
            return None
        if self._size >= self._max_size_bytes:
            self._rotate()
        room = self._max_size_bytes - self._size
        if not chunk.lines or len(chunk.data) <= room:
            return None
        end = chunk.data.find(b"\n", room - 1) + 1
        if end in (0, len(chunk.data)):
            return None
        raw_end = json_file.nth_newline_end(chunk.raw, chunk.data.count(b"\n", 0, end))
        return (
            Chunk(chunk.raw[:raw_end], chunk.data[:end], chunk.lossy, chunk.lines),
            Chunk(chunk.raw[raw_end:], chunk.data[end:], chunk.lossy, chunk.lines),
        )

    def _append(self, stream: str, chunk: Chunk) -> None:
        size = self._size
        written = self._try_append(chunk.data)
        with self.file_lock:
            index = self.index[stream]
            index.add(Place(index.written, self.generation, size, lossy=chunk.lossy or not written))
            index.written += len(chunk.raw)
            self._wrote(stream, index.written)
        if not written:
            try:
                self._loop.call_soon_threadsafe(self._dropped, stream, len(chunk.raw))
            except RuntimeError:  # the loop is closed: nobody counts
                return

    def _try_append(self, data: bytes) -> bool:
        while True:
            error = self._append_whole(data)
            if error is None:
                self._stuck = self._failing = False
                return True
            if not self._failing:
                log.error("log file cannot be written", path=str(self.path), error=error)
                self._failing = True
            if not self._block_on_full:
                return False
            self._stuck = True
            self._wake()
            with self._condition:
                if self._stopping:
                    return False
                self._condition.wait(_RETRY_S)

    def _append_whole(self, data: bytes) -> str | None:
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self._fd, view) :]
        except OSError as error:
            if len(view) < len(data):
                os.ftruncate(self._fd, self._size)
            return error.strerror or str(error)
        self._size += len(data)
        return None

    def _rotate(self) -> None:
        with self.file_lock:
            os.close(self._fd)
            name = self.path
            try:
                for number in range(self._max_files - 1, 0, -1):
                    older = name.with_name(f"{name.name}.{number}")
                    newer = name.with_name(f"{name.name}.{number - 1}") if number > 1 else name
                    if newer.exists():
                        newer.rename(older)
                if self._max_files == 1:
                    name.unlink(missing_ok=True)
            except OSError as error:
                log.error("log file cannot be rotated", path=str(name), error=error.strerror)
            self._next_generation(self._max_files)

    def _reopen_file(self) -> None:
        with self.file_lock:
            os.close(self._fd)
            # Where the old files are now is not known.
            self._next_generation(1)

    def _next_generation(self, kept: int) -> None:
        self.generation += 1
        self.oldest_generation = max(self.oldest_generation, self.generation - kept + 1)
        for index in self.index.values():
            index.places = [
                place for place in index.places if place.generation >= self.oldest_generation
            ]
        try:
            self._fd, self._size = self._open()
        except FailedPrecondition as error:
            log.error("log file cannot be opened", path=str(self.path), error=error.message)
            self._fd, self._size = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), 0

    def _open(self) -> tuple[int, int]:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(
                self.path,
                os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY,
                _LOG_FILE_MODE,
            )
        except OSError as error:
            raise FailedPrecondition(
                f"log file {self.path} cannot be opened: {error.strerror}"
            ) from error
        return fd, os.fstat(fd).st_size


def _cut_torn_line(path: Path) -> None:
    """Cut a file back to its last whole line: a writer was killed while it wrote."""
    try:
        with path.open("r+b") as file:
            end = size = file.seek(0, os.SEEK_END)
            while end > 0:
                begin = max(0, end - _TORN_PIECE_BYTES)
                file.seek(begin)
                newline = file.read(end - begin).rfind(b"\n")
                end = begin + newline + 1
                if newline >= 0:
                    break
            if end < size:
                file.truncate(end)
    except OSError as error:
        log.error("torn log file cannot be mended", path=str(path), error=error.strerror)
