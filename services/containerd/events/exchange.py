"""Publishing and subscribing as upstream has them, both on the journal.

A subscriber gets what happens from now on, of all namespaces, and never loses an event for being
slow: it reads the journal at its own pace.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.common.errors import InvalidArgument
from services.containerd.filters import parse
from services.containerd.identifiers import checked_identifier

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from services.common.database import Database
    from services.containerd.events.journal import Journal, JournalEntry
    from services.containerd.typed import TypedValue

    EventField = Callable[[TypedValue, Sequence[str]], str | None]
    """Gives a field of an event's message by its path; None if it is not there."""


class Exchange:
    """Publishes events, and hands them to subscribers.

    Args:
        db: the open database.
        journal: where the events are.
        event_field: looks into messages, for filters.
    """

    def __init__(self, db: Database, journal: Journal, event_field: EventField) -> None:
        self._db = db
        self._journal = journal
        self._event_field = event_field

    async def publish(
        self,
        namespace: str,
        topic: str,
        event: TypedValue,
        *,
        timestamp_ns: int | None = None,
    ) -> None:
        """Record an event of a client; returns once it is on the disk.

        Args:
            namespace: where it happened.
            topic: what happened, as a path.
            event: its message.
            timestamp_ns: when; None: now.

        Raises:
            InvalidArgument: the namespace or the topic is malformed.
        """
        checked_identifier(namespace, what="namespace of an event", field="namespace")
        _check_topic(topic)
        await self._db.write(
            lambda tx: self._journal.append_encoded(
                tx,
                namespace,
                topic,
                type_url=event.type_url,
                value=event.value,
                timestamp_ns=timestamp_ns,
            )
        )

    async def subscribe(self, filters: Sequence[str]) -> AsyncIterator[JournalEntry]:
        """Events from now on that match any of the filters; all if there are none.

        Filters know ``topic``, ``namespace`` and ``event``, whose fields follow after a dot.

        Raises:
            InvalidArgument: a filter does not parse.
            Truncated: the subscriber is so slow that events it did not have yet are gone.
        """
        wanted = parse(filters)
        async for entry in self._journal.read(await self._journal.last_seq() + 1):
            if wanted.matches(lambda path, entry=entry: self._field(entry, path)):  # type: ignore[misc]
                yield entry

    def _field(self, entry: JournalEntry, path: Sequence[str]) -> str | None:
        if path[0] == "event":
            return self._event_field(entry.event, path[1:])
        return {"topic": entry.topic, "namespace": entry.namespace}.get(path[0])


def _check_topic(topic: str) -> None:
    if not topic.startswith("/") or len(topic) == 1:
        raise InvalidArgument(
            f"topic {topic[:200]!r} is malformed: want /<word>/<word>", field="topic"
        )
    for component in topic[1:].split("/"):
        checked_identifier(component, what=f"part of topic {topic[:200]!r}", field="topic")
