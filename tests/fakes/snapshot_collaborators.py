"""What a snapshotter asks of others, kept in lists for the tests to read."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Mapping


class RecordedEvents:
    """Keeps each event as ``(namespace, topic, type name, fields)``."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str, str, dict[str, object]]] = []

    def append(
        self,
        tx: sqlite3.Connection,
        namespace: str,
        topic: str,
        type_name: str,
        fields: Mapping[str, object],
    ) -> None:
        assert tx.in_transaction
        self.events.append((namespace, topic, type_name, dict(fields)))


class RecordedLeases:
    """Keeps what is under a lease; ``lease`` is the current one."""

    def __init__(self) -> None:
        self.lease = ""
        self.held: set[tuple[str, str, str, str]] = set()

    def current(self) -> str:
        return self.lease

    def attach(
        self, tx: sqlite3.Connection, namespace: str, lease: str, kind: str, resource: str
    ) -> None:
        assert tx.in_transaction
        if lease:
            self.held.add((namespace, lease, kind, resource))

    def detach(self, tx: sqlite3.Connection, namespace: str, kind: str, resource: str) -> None:
        assert tx.in_transaction
        self.held = {
            held for held in self.held if (held[0], held[2], held[3]) != (namespace, kind, resource)
        }
