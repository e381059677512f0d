"""The journal as tasks need it: events of shims go in exactly once, exit statuses come out.

A shim's events are known by (instance id, sequence number). What containerd has to say for a shim
that is dead (how its processes ended) takes the next numbers of the same instance, so that a burial
that is repeated after a crash finds what it said before.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from services.common.frozen import frozen
from services.containerd.metadata import tasks as rows
from services.containerd.typed import TypedValue

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Sequence

    from services.common.database import Database
    from services.containerd.events.journal import Journal
    from services.containerd.tasks.shim import ProcessExit

TOPIC_EXIT = "/tasks/exit"
TOPIC_DELETE = "/tasks/delete"
TOPIC_EXEC_ADDED = "/tasks/exec-added"
TOPIC_LOST = "/tasks/lost"


@frozen
class ShimEvent:
    """One event out of a shim's spool; its message is not looked into."""

    seq: int
    timestamp_ns: int
    topic: str
    event: TypedValue


@frozen
class ExitNotice:
    """A process ended. ``exec_id`` is empty for init; ``exit`` is None where it is lost."""

    container_id: str
    exec_id: str
    exit: ProcessExit | None


@frozen
class ShimNotice:
    """What became of a shim, for an event."""

    namespace: str
    id: str
    instance_id: str
    pid: int
    start_time: int
    bundle: str
    exits: tuple[ExitNotice, ...] = ()


class EventCodec(Protocol):
    """Reads and makes the messages of events; the only place that knows their encoding."""

    def decode_exit(self, event: TypedValue) -> ExitNotice | None:
        """What a ``TaskExit``, or a lost process' event, says; None if it cannot be read."""

    def decode_exec_added(self, event: TypedValue) -> str:
        """The exec id of a ``TaskExecAdded``; empty if it cannot be read."""

    def encode_exit(self, notice: ExitNotice) -> TypedValue:
        """A ``TaskExit``; for a lost status, the process' state with the flag that says so."""

    def encode_delete(self, container_id: str, exit: ProcessExit) -> TypedValue:
        """The ``TaskDelete`` of a container's first process."""

    def encode_shim(self, notice: ShimNotice) -> TypedValue:
        """A ``theseus.shim.v1.Hello`` that describes the shim."""

    def decode_spooled(self, data: bytes) -> ShimEvent | None:
        """What one file of a spool says; None if it cannot be read."""


class TaskJournal:
    """What tasks write to and read from the journal.

    Args:
        db: where it lies.
        journal: takes the events.
        codec: knows their messages.
    """

    def __init__(self, db: Database, journal: Journal, codec: EventCodec) -> None:
        self._db = db
        self._journal = journal
        self.codec = codec

    @property
    def is_followed(self) -> bool:
        """Whether anybody hears of an event as soon as it is recorded."""
        return self._journal.is_followed

    async def record(
        self, namespace: str, instance_id: str, events: Sequence[ShimEvent]
    ) -> list[ShimEvent]:
        """Append events of one shim, in order, in one transaction.

        Returns:
            Those that were new, once all are on the disk.
        """

        def append(tx: sqlite3.Connection) -> list[ShimEvent]:
            return [event for event in events if self._append(tx, namespace, instance_id, event)]

        return await self._db.write(append)

    async def progress(self, instance_id: str) -> int:
        """Sequence number of the last event of a shim that is in the journal; 0 for none."""
        return self._db.look(lambda tx: self._journal.shim_progress(tx, instance_id))

    async def exits(self, instance_id: str) -> dict[str, ProcessExit | None]:
        """How processes of a shim ended, by exec id; None: lost, and reported so."""
        rows_found = await self._db.read(
            lambda tx: rows.shim_events(tx, instance_id, (TOPIC_EXIT, TOPIC_LOST))
        )
        found: dict[str, ProcessExit | None] = {}
        for type_url, value in rows_found:
            notice = self.codec.decode_exit(TypedValue(type_url, value))
            if notice is not None:
                found[notice.exec_id] = notice.exit
        return found

    async def deleted(self, instance_ids: Sequence[str]) -> set[str]:
        """The shims among these that have told last that their container is deleted."""
        return await self._db.read(
            lambda tx: {i for i in instance_ids if rows.last_topic(tx, i) == TOPIC_DELETE}
        )

    async def say_for(
        self, namespace: str, instance_id: str, messages: Sequence[tuple[str, TypedValue]]
    ) -> None:
        """Append (topic, message) pairs in the name of a shim that is dead, each once."""

        def append(tx: sqlite3.Connection) -> None:
            for topic, message in messages:
                said = rows.shim_events(tx, instance_id, (topic,))
                if (message.type_url, message.value) in said:
                    continue
                seq = self._journal.shim_progress(tx, instance_id) + 1
                event = ShimEvent(seq, time.time_ns(), topic, message)
                self._append(tx, namespace, instance_id, event)

        await self._db.write(append)

    async def forward(self, namespace: str, instance_id: str, event: ShimEvent) -> None:
        """Append an event of a shim that numbers none; the number of ``event`` is not looked at.

        An exit is told once: it may have been asked for before the shim came to tell of it.
        """

        def append(tx: sqlite3.Connection) -> None:
            if event.topic == TOPIC_EXIT:
                said = rows.shim_events(tx, instance_id, (TOPIC_EXIT,))
                if (event.event.type_url, event.event.value) in said:
                    return
            seq = self._journal.shim_progress(tx, instance_id) + 1
            self._append(tx, namespace, instance_id, replace(event, seq=seq))

        await self._db.write(append)

    async def say(self, namespace: str, topic: str, message: TypedValue) -> None:
        """Append an event of containerd's own."""
        await self._db.write(
            lambda tx: self._journal.append_encoded(
                tx, namespace, topic, type_url=message.type_url, value=message.value
            )
        )

    async def forget(self, instance_id: str) -> None:
        """Forget how far a shim was, once its bundle is gone."""
        await self._db.write(lambda tx: self._journal.forget_shim(tx, instance_id))

    def _append(
        self, tx: sqlite3.Connection, namespace: str, instance_id: str, event: ShimEvent
    ) -> bool:
        return self._journal.append_shim_event(
            tx,
            instance_id,
            event.seq,
            namespace=namespace,
            topic=event.topic,
            type_url=event.event.type_url,
            value=event.event.value,
            timestamp_ns=event.timestamp_ns,
        )
