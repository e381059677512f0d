"""The spool: events of a shim that containerd has not yet acknowledged.

    <bundle>/spool/<seq>    one JSON object per event; seq counts from 1 and has no gaps

A file appears whole, by a rename, before anybody is told of its event. It is not fsynced: it has to
outlive this process, not the machine, since no container outlives that either. An acknowledgement
removes the files up to its number except the highest ever written, which keeps the sequence going
for a process that takes over the bundle. When the disk takes no more, events wait in memory: a
container's end is then still told, as long as this process lives.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import structlog

from services.common import small_files
from services.common.frozen import frozen
from services.shim.events import Event

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

log = structlog.get_logger(__name__)

_RECENT = 8


@frozen
class SpooledEvent:
    """An event with its sequence number and the time at which it happened."""

    seq: int
    timestamp_ns: int
    event: Event


class Spool:
    """The events of one shim; implements :class:`~services.shim.events.EventSink`.

    Args:
        directory: made if it does not exist.
        write_failed: called for each event that only memory holds.
        keep: hold events in memory too, since the directory may be removed before they are taken.
    """

    def __init__(
        self,
        directory: Path,
        write_failed: Callable[[], None] = lambda: None,
        *,
        keep: bool = False,
    ) -> None:
        self._prefix = f"{directory}/"
        self._keep = keep
        self._write_failed = write_failed
        directory.mkdir(mode=0o711, exist_ok=True)
        kept = sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit())
        self.last_seq = kept[-1] if kept else 0
        self._files = set(kept)
        self._acked = kept[0] - 1 if kept else 0
        self._held: set[int] = set()
        self._memory: dict[int, SpooledEvent] = {}
        self._changed = asyncio.Event()

    def pack(self) -> dict[str, Any]:
        """What the next image of the shim cannot see in the directory."""
        memory = [_document(spooled) for spooled in self._memory.values()]
        return {"acked": self._acked, "memory": memory}

    def unpack(self, saved: Mapping[str, Any]) -> None:
        """Take over what an earlier image knew."""
        self._acked = saved["acked"]
        for entry in saved["memory"]:
            self._memory[entry["seq"]] = _spooled(entry)
            self.last_seq = max(self.last_seq, entry["seq"])

    @property
    def first_seq(self) -> int:
        """Lowest number not acknowledged; last_seq + 1 when all are, 0 when none ever was."""
        return self._acked + 1 if self.last_seq else 0

    @property
    def acked_seq(self) -> int:
        """Highest number that is acknowledged."""
        return self._acked

    def __len__(self) -> int:
        return self.last_seq - self._acked

    def record(self, event: Event) -> int:
        """Put an event into the spool without offering it; returns its sequence number."""
        seq = self.last_seq + 1
        spooled = SpooledEvent(seq, time.time_ns(), event)
        try:
            self._write(spooled)
        except OSError as error:
            self._memory[seq] = spooled
            self._write_failed()
            log.error("spool write failed, event kept in memory", seq=seq, error=str(error))
        if self._keep or len(self._memory) < _RECENT:  # most go out in a moment
            self._memory[seq] = spooled
        self.last_seq = seq
        self._held.add(seq)
        return seq

    def offer(self, seq: int) -> None:
        """Let a recorded event go out; it does once all before it were offered."""
        self._held.discard(seq)
        self._changed.set()

    def emit(self, event: Event) -> None:
        """Record and offer an event."""
        self.offer(self.record(event))

    def acknowledge(self, seq: int) -> None:
        """Forget the events up to ``seq``; any number is harmless."""
        for done in range(self._acked + 1, min(seq, self.last_seq) + 1):
            self._acked = done
            self._memory.pop(done, None)
        for name in [kept for kept in self._files if kept <= self._acked and kept < self.last_seq]:
            with suppress(FileNotFoundError):
                os.unlink(f"{self._prefix}{name}")  # noqa: PTH108
            self._files.discard(name)
        self._changed.set()

    def leave_directory(self) -> None:
        """Touch the directory no more: it may be another spool's by now (see ``keep``)."""
        self._files.clear()

    async def next(self, after: int) -> SpooledEvent:
        """The event behind ``after``, once there is one that may go out."""
        while self._offered_seq() <= after:
            self._changed.clear()
            await self._changed.wait()
        return self._load(max(after, self._acked) + 1)

    async def emptied(self) -> None:
        """Wait until every event is acknowledged."""
        while len(self):
            self._changed.clear()
            await self._changed.wait()

    def _offered_seq(self) -> int:
        return min(self._held) - 1 if self._held else self.last_seq

    def _load(self, seq: int) -> SpooledEvent:
        if seq in self._memory:
            return self._memory[seq]
        return _spooled(json.loads(small_files.read(f"{self._prefix}{seq}")))

    def _write(self, spooled: SpooledEvent) -> None:
        path = f"{self._prefix}{spooled.seq}"
        small_files.replace(path, f"{path}.tmp", json.dumps(_document(spooled)).encode())
        self._files.add(spooled.seq)


def _document(spooled: SpooledEvent) -> dict[str, Any]:
    return {
        "seq": spooled.seq,
        "timestamp_ns": spooled.timestamp_ns,
        "topic": spooled.event.topic,
        "fields": dict(spooled.event.fields),
    }


def _spooled(document: Mapping[str, Any]) -> SpooledEvent:
    event = Event(document["topic"], document["fields"])
    return SpooledEvent(document["seq"], document["timestamp_ns"], event)
