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
from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import structlog

from services.common.errors import FailedPrecondition
from services.common.frozen import frozen
from services.shim.futures import finish
from services.shim.handover import data_of
from services.shim.stdio.formats import Chunk
from services.shim.stdio.lines import nth_newline_end
from services.shim.stdio.log_index import Place, StreamIndex

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from services.shim.handover import Outgoing
    from services.shim.stdio.formats import Format

log = structlog.get_logger(__name__)

QUEUE_MAX_BYTES = 4 << 20
_JOIN_MAX_BYTES = 256 << 10
# Of chunks written at once; each has up to three pieces, and a call takes 1024 (writev(2)).
_BATCH_MAX = 300
_RETRY_S = 1.0
_TORN_PIECE_BYTES = 65536
_LOG_FILE_MODE = 0o640


@frozen
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
        newlines: called in the event loop with a stream and how many newlines more it had.

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
        newlines: Callable[[str, int], None] = lambda _stream, _count: None,
    ) -> None:
        self._count_newlines = newlines
        self._newlines = {"stdout": 0, "stderr": 0}
        self._newlines_told = dict(self._newlines)
        self._wrote = wrote
        self.path = path
        self.generation = 0  # guarded by file_lock
        self.oldest_generation = 0  # guarded by file_lock
        self.file_lock = threading.Lock()
        self.index = {name: StreamIndex() for name in ("stdout", "stderr")}  # guarded by file_lock
        self.format = form
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
                    stream: out.data(rest) for stream, rest in self.format.unfinished().items()
                },
            }

    def _resume(self, saved: Mapping[str, Any]) -> tuple[int, int]:
        self.generation = saved["generation"]
        self.oldest_generation = saved["oldest_generation"]
        self.index = {name: StreamIndex.unpack(index) for name, index in saved["index"].items()}
        self.format.resume({stream: data_of(rest) for stream, rest in saved["unfinished"].items()})
        if saved["fd"] >= 0:
            return saved["fd"], os.fstat(saved["fd"]).st_size
        if self.format.lines:
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
            for item in _joined(items):
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
        for stream, count in self._newlines.items():
            self._count_newlines(stream, count - self._newlines_told[stream])
            self._newlines_told[stream] = count
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
            chunks = self.format.finish(item.stream, item.time_ns)
        else:
            chunks = self.format.feed(item.stream, item.data, item.time_ns)
        batch: list[Chunk] = []
        for chunk in chunks:
            if len(batch) == _BATCH_MAX or (batch and batch[0].lossy != chunk.lossy):
                self._write_batch(item.stream, batch)
                batch = []
            batch.append(chunk)
        self._write_batch(item.stream, batch)

    def _write_batch(self, stream: str, batch: Sequence[Chunk]) -> None:
        """Write chunks at once, unless a new file has to begin among them."""
        self._newlines[stream] += sum(chunk.newlines for chunk in batch)
        size = sum(chunk.size_bytes for chunk in batch)
        if len(batch) > 1 and (
            not self._max_size_bytes or self._size + size <= self._max_size_bytes
        ):
            pieces = tuple(piece for chunk in batch for piece in chunk.pieces)
            raw = b"".join(chunk.raw for chunk in batch)
            self._append(stream, Chunk(raw, pieces, batch[0].lossy, lines=False))
            return
        for chunk in batch:
            self._write_chunk(stream, chunk)

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
        if not chunk.lines or chunk.size_bytes <= room:
            return None
        data = chunk.data
        end = data.find(b"\n", room - 1) + 1
        if end in (0, len(data)):
            return None
        raw_end = nth_newline_end(chunk.raw, data.count(b"\n", 0, end))
        return (
            Chunk(chunk.raw[:raw_end], (data[:end],), chunk.lossy, chunk.lines),
            Chunk(chunk.raw[raw_end:], (data[end:],), chunk.lossy, chunk.lines),
        )

    def _append(self, stream: str, chunk: Chunk) -> None:
        size = self._size
        written = self._try_append(chunk)
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

    def _try_append(self, chunk: Chunk) -> bool:
        while True:
            error = self._append_whole(chunk)
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

    def _append_whole(self, chunk: Chunk) -> str | None:
        size = chunk.size_bytes
        written = 0
        try:
            written = os.writev(self._fd, chunk.pieces)
            if written < size:
                view = memoryview(chunk.data)
                while written < size:
                    written += os.write(self._fd, view[written:])
        except OSError as error:
            if written:
                os.ftruncate(self._fd, self._size)
            return error.strerror or str(error)
        self._size += size
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


def _joined(items: Iterable[_Item]) -> Iterator[_Item]:
    """The items, small ones of a stream that follow one another as one: each costs a system call.

    Together they get the time of the first, which is at most a queue's length older.
    """
    held: list[_Item] = []
    held_bytes = 0
    for item in items:
        size = len(item.data or b"")
        fits = (
            held
            and item.data is not None
            and held[0].stream == item.stream
            and held_bytes + size <= _JOIN_MAX_BYTES
        )
        if held and not fits:
            yield _join(held)
            held, held_bytes = [], 0
        if item.data is None:
            yield item
        else:
            held.append(item)
            held_bytes += size
    if held:
        yield _join(held)


def _join(items: Sequence[_Item]) -> _Item:
    if len(items) == 1:
        return items[0]
    return replace(items[0], data=b"".join(item.data or b"" for item in items))


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
