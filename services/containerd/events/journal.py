"""The journal: every event of the node, in order, with sequence numbers that have no gaps.

Events are appended inside the transactions that make them true, and read from the database; what is
in memory is only the wake-up of readers that follow. It is bounded by number, size and age, and a
reader that asks for what was cut off is told so instead of being given less.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

import structlog

from services.common.errors import OutOfRange, Unavailable
from services.common.frozen import frozen
from services.containerd.metadata import journal as rows
from services.containerd.typed import TypedValue

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence

    from services.common.database import Database

log = structlog.get_logger(__name__)

_BATCH = 256
_FEW = 8
_TRUNCATION_S = 600.0


class Truncated(OutOfRange):
    """Events that were asked for have been cut off.

    Attributes:
        first_seq: the first that is left.
    """

    def __init__(self, wanted: int, first_seq: int) -> None:
        super().__init__(
            f"journal is truncated: event {wanted} was asked for, first is {first_seq}; "
            f"read what the events were about again, then read on from {first_seq}"
        )
        self.first_seq = first_seq


@frozen
class JournalEntry:
    """One event and its message."""

    seq: int
    timestamp_ns: int
    namespace: str
    topic: str
    event: TypedValue


class Journal:
    """Implements ``EventSink``; ``attach`` before the first event.

    Args:
        db: where it lies.
        encode: makes the bytes of a message out of its name and fields.
        keep_events: how many events are kept.
        keep_s: for how many seconds they are kept.
        keep_bytes: how many bytes of them are kept.
    """

    def __init__(
        self,
        db: Database,
        encode: Callable[[str, Mapping[str, object]], bytes],
        *,
        keep_events: int = 100_000,
        keep_s: float = 7 * 24 * 3600,
        keep_bytes: int = 64 << 20,
    ) -> None:
        self._db = db
        self._encode = encode
        self._keep_events = keep_events
        self._keep_s = keep_s
        self._keep_bytes = keep_bytes
        self._new_bytes = 0  # since the last truncation; touched in the writer's thread
        self._grown = asyncio.Event()
        self._appended = False  # touched in the writer's thread only
        self._wakeup = asyncio.Event()
        self._followers = 0
        self._stopped = False

    def attach(self) -> None:
        """Have readers that follow woken by commits."""
        self._db.on_commit(self._committed)

    def stop(self) -> None:
        """End all readers that follow: the process drains."""
        self._stopped = True
        self._wake()

    @property
    def is_followed(self) -> bool:
        """Whether anybody hears of an event as soon as it is committed."""
        return self._followers > 0

    def append(
        self,
        tx: sqlite3.Connection,
        namespace: str,
        topic: str,
        type_name: str,
        fields: Mapping[str, object],
    ) -> None:
        """As ``EventSink.append``."""
        self.append_encoded(
            tx, namespace, topic, type_url=type_name, value=self._encode(type_name, fields)
        )

    def append_encoded(
        self,
        tx: sqlite3.Connection,
        namespace: str,
        topic: str,
        *,
        type_url: str,
        value: bytes,
        timestamp_ns: int | None = None,
    ) -> None:
        """Append an event whose message is in bytes already; its time is now, unless told."""
        rows.append(
            tx,
            timestamp_ns=time.time_ns() if timestamp_ns is None else timestamp_ns,
            namespace=namespace,
            topic=topic,
            type_url=type_url,
            value=value,
        )
        self._appended = True
        self._new_bytes += len(value)

    def append_shim_event(
        self,
        tx: sqlite3.Connection,
        instance_id: str,
        seq: int,
        *,
        namespace: str,
        topic: str,
        type_url: str,
        value: bytes,
        timestamp_ns: int,
    ) -> bool:
        """Append an event out of a shim's spool, exactly once however often it is sent.

        Returns:
            False if the journal has it already. Once the transaction has committed, the event may
            be acknowledged in both cases.
        """
        if seq <= rows.shim_progress(tx, instance_id):
            return False
        rows.append(
            tx,
            timestamp_ns=timestamp_ns,
            namespace=namespace,
            topic=topic,
            type_url=type_url,
            value=value,
            shim=instance_id,
            shim_seq=seq,
        )
        rows.set_shim_progress(tx, instance_id, seq)
        self._appended = True
        self._new_bytes += len(value)
        return True

    def shim_progress(self, tx: sqlite3.Connection, instance_id: str) -> int:
        """The last event of a shim that is in the journal; 0 for none."""
        return rows.shim_progress(tx, instance_id)

    def forget_shim(self, tx: sqlite3.Connection, instance_id: str) -> None:
        """Forget a shim whose bundle is gone: it will never send again."""
        rows.forget_shim(tx, instance_id)

    async def last_seq(self) -> int:
        """The sequence number of the newest event; 0 when there was none."""
        return self._db.look(rows.bounds)[1]

    async def read(
        self, from_seq: int = 0, *, namespace: str = "", follow: bool = True
    ) -> AsyncIterator[JournalEntry]:
        """Events from a sequence number on.

        Args:
            from_seq: the first one wanted; 0: the first that exists. The number after the newest is
                the next one to come.
            namespace: only those of this namespace; empty: all.
            follow: wait for new ones instead of ending.

        Raises:
            Truncated: the first one wanted, or the next one after those that were read, is gone.
            OutOfRange: the first one wanted lies past the next one to come.
            Unavailable: the process is stopping; what it had was read.
        """
        first, last = self._db.look(rows.bounds)
        next_seq = from_seq or first
        if next_seq > last + 1:
            raise OutOfRange(
                f"event {next_seq} was asked for, the newest is {last}: "
                "the journal was started anew; read from 0"
            )
        self._followers += follow
        try:
            while True:
                wakeup = self._wakeup  # before the read: what commits after it, wakes us
                batch, first = self._db.look(partial(_read, seq=next_seq, limit=_FEW))
                if len(batch) == _FEW:  # whoever follows finds one or two; these are more
                    batch, first = await self._db.read(partial(_read, seq=next_seq, limit=_BATCH))
                if next_seq < first:
                    raise Truncated(next_seq, first)
                for row in batch:
                    next_seq = row["seq"] + 1
                    if not namespace or row["namespace"] == namespace:
                        yield _from_row(row)
                if len(batch) < _BATCH:
                    if not follow:
                        return
                    if self._stopped:
                        raise Unavailable(
                            f"containerd is stopping: read on from event {next_seq} when it is "
                            "back",
                            retry_after_s=0.1,
                        )
                    await wakeup.wait()
        finally:
            self._followers -= follow

    async def keep_bounded(self) -> None:
        """Cut off what passes the bounds, at times and when much has come, until cancelled."""
        while True:
            self._grown.clear()
            await self.truncate()
            with suppress(TimeoutError):
                async with asyncio.timeout(_TRUNCATION_S):
                    await self._grown.wait()

    async def truncate(self) -> int:
        """Cut off what passes the bounds; returns how many events went."""
        before_ns = time.time_ns() - int(self._keep_s * 1e9)
        first = await self._db.read(lambda tx: rows.first_within(tx, self._keep_bytes))

        def cut(tx: sqlite3.Connection) -> int:
            self._new_bytes = 0
            return rows.truncate(tx, keep=self._keep_events, older_than_ns=before_ns, first=first)

        count = await self._db.write(cut)
        if count:
            log.info("journal truncated", events=count)
        return count

    def _committed(self) -> Callable[[], None] | None:
        if not self._appended:
            return None
        self._appended = False
        return self._wake_and_grow if self._new_bytes > self._keep_bytes // 4 else self._wake

    def _wake_and_grow(self) -> None:
        self._wake()
        self._grown.set()

    def _wake(self) -> None:
        self._wakeup.set()
        self._wakeup = asyncio.Event()


def _from_row(row: sqlite3.Row) -> JournalEntry:
    return JournalEntry(
        seq=row["seq"],
        timestamp_ns=row["timestamp_ns"],
        namespace=row["namespace"],
        topic=row["topic"],
        event=TypedValue(row["type_url"], row["value"]),
    )


def _read(tx: sqlite3.Connection, *, seq: int, limit: int) -> tuple[Sequence[sqlite3.Row], int]:
    """Events from ``seq`` on, and the number of the oldest that there is, or ``seq``."""
    found = rows.read(tx, seq, limit=limit)
    if found and found[0]["seq"] == seq:  # so nothing of what was asked for is gone
        return found, seq
    return found, rows.bounds(tx)[0]
