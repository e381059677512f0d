"""Where the domain puts its events: into the journal, in the transaction that makes them true.

An event is in the journal exactly when what it tells has happened, because both are one commit.
Topics and message names are containerd's (``/images/create``, ``containerd.events.ImageCreate``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Mapping


class EventSink(Protocol):
    """Takes events in. Readers see an event as soon as its transaction has committed."""

    def append(
        self,
        tx: sqlite3.Connection,
        namespace: str,
        topic: str,
        type_name: str,
        fields: Mapping[str, object],
    ) -> None:
        """Record an event as a part of ``tx``. Called in the database's thread.

        Args:
            tx: the transaction that does what the event tells.
            namespace: where it happened.
            topic: what happened, as a path: ``/snapshot/prepare``.
            type_name: the event's message: ``containerd.events.SnapshotPrepare``.
            fields: the message's fields by their names in the contract. A nested message is a
                mapping, a map a mapping, a repeated field a sequence, a time a number of
                nanoseconds since the epoch, an ``Any`` a :class:`TypedValue`. What is left out,
                None or empty stays unset.

        Raises:
            Internal: there is no such message, or it has no such field.
        """
