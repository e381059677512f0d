"""Logs as users read them: chosen, bounded, followed until the container stops.

Following waits for inotify and for changes of the record, and never polls. The place where a reader
is belongs to the reader: after a restart of the daemon a client asks again with an offset.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import ExitStack
from dataclasses import field, replace
from typing import TYPE_CHECKING

from services.common.frozen import frozen
from services.daemon.containers.logfile import LogCursor, LogEntry
from services.daemon.containers.runtime import StreamKind

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from services.daemon.containers.directory_watch import DirectoryWatch
    from services.daemon.containers.files import ContainerFiles
    from services.daemon.containers.record import ContainerId
    from services.daemon.containers.store import ContainerStore

_BOTH = frozenset({StreamKind.STDOUT, StreamKind.STDERR})


@frozen
class LogSelection:
    """What of a log is wanted.

    Attributes:
        tail: last lines only; None for all.
        since_ns: nothing older; ``until_ns``: nothing newer; 0 for no bound.
        skip_bytes: of what the rest selects.
    """

    follow: bool = False
    tail: int | None = None
    since_ns: int = 0
    until_ns: int = 0
    streams: frozenset[StreamKind] = field(default=_BOTH)
    skip_bytes: int = 0


class Logs:
    """Reads the logs of containers."""

    def __init__(self, store: ContainerStore, files: ContainerFiles, watch: DirectoryWatch) -> None:
        self._watch = watch
        self._store = store
        self._files = files

    async def read(
        self, container_id: ContainerId, selection: LogSelection
    ) -> AsyncGenerator[list[LogEntry], None]:
        """Entries in order, several at a time, each list with one at least."""
        path = self._files.log_path(container_id)
        with ExitStack() as stack:
            changed = stack.enter_context(self._store.watching(container_id))
            if selection.follow:
                stack.enter_context(self._watch.watching(path.parent, changed))
            cursor = LogCursor(path)
            try:
                await asyncio.to_thread(_seek, cursor, selection)
                selection = _bounded(selection)
                chosen = _Chosen(selection)
                while True:
                    changed.clear()
                    live = self._live(container_id)
                    entries = await asyncio.to_thread(cursor.read)
                    if wanted := chosen.take(entries):
                        yield wanted
                    if chosen.ended or (not entries and not (selection.follow and live)):
                        return
                    if not entries and not await _changed(changed, selection.until_ns):
                        return
            finally:
                await asyncio.to_thread(cursor.close)

    def _live(self, container_id: ContainerId) -> bool:
        record = self._store.get(container_id)
        return record is not None and record.live


class _Chosen:
    """Applies a selection to entries as they come."""

    def __init__(self, selection: LogSelection) -> None:
        self._selection = selection
        self._skip = selection.skip_bytes
        self.ended = False

    def take(self, entries: list[LogEntry]) -> list[LogEntry]:
        """Those that are wanted; ``ended`` is set once no more can be."""
        taken = []
        for entry in entries:
            if self._selection.until_ns and entry.timestamp_ns > self._selection.until_ns:
                self.ended = True
                break
            if entry.stream not in self._selection.streams:
                continue
            if entry.timestamp_ns < self._selection.since_ns:
                continue
            data = entry.data[self._skip :]
            self._skip -= len(entry.data) - len(data)
            if data:
                taken.append(LogEntry(entry.timestamp_ns, entry.stream, data))
        return taken


def _seek(cursor: LogCursor, selection: LogSelection) -> None:
    if selection.tail is None:
        cursor.to_start()
    else:
        cursor.to_tail(selection.tail, selection.streams)


def _bounded(selection: LogSelection) -> LogSelection:
    """Without following, the log ends now: a busy container would keep its reader for ever."""
    if selection.follow:
        return selection
    now_ns = time.time_ns()
    return replace(selection, until_ns=min(selection.until_ns or now_ns, now_ns))


async def _changed(changed: asyncio.Event, until_ns: int) -> bool:
    """Wait for something new; False when ``until_ns`` passes first."""
    timeout_s = max(0.0, (until_ns - time.time_ns()) / 1e9) if until_ns else None
    try:
        async with asyncio.timeout(timeout_s):
            await changed.wait()
    except TimeoutError:
        return False
    return True
