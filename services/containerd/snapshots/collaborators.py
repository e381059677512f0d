"""What a snapshotter asks of others, each within its own transactions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import sqlite3


class SnapshotLeases(Protocol):
    """What keeps snapshots that nothing refers to yet from the collector."""

    def current(self) -> str:
        """The lease that the calling task works under; empty if there is none.

        Called on the event loop, before the transaction.
        """

    def attach(
        self, tx: sqlite3.Connection, namespace: str, lease: str, kind: str, resource: str
    ) -> None:
        """Put a resource under a lease, whether or not it is already; none if ``lease`` is empty.

        ``kind`` is ``snapshots/<snapshotter>``, and the resource is a key.
        """

    def detach(self, tx: sqlite3.Connection, namespace: str, kind: str, resource: str) -> None:
        """Take a resource, which is no more, from every lease of the namespace."""
