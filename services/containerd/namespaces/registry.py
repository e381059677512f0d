"""The namespaces of a node, with their labels.

A namespace is made by name, or comes to be with the first thing that is recorded in it; it goes
only when it is deleted, and that only when it holds no image, blob, container or snapshot.
"""

from __future__ import annotations

from dataclasses import field
from typing import TYPE_CHECKING

from services.common.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from services.common.frozen import frozen
from services.containerd.content.labels import checked_labels
from services.containerd.identifiers import checked_identifier
from services.containerd.metadata import namespaces as rows

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Mapping, Sequence

    from services.common.database import Database
    from services.containerd.events.sink import EventSink


@frozen
class Namespace:
    """What is recorded of a namespace."""

    name: str
    labels: Mapping[str, str] = field(default_factory=dict)


class NamespaceInUse(FailedPrecondition):
    """A namespace that is to be deleted still holds something."""


class Namespaces:
    """Keeps namespaces. Every method is safe to call concurrently."""

    def __init__(self, db: Database, events: EventSink) -> None:
        self._db = db
        self._events = events

    async def get(self, name: str) -> Namespace:
        """A namespace by its name; one that does not exist has no labels, as upstream has it."""
        labels = self._db.look(lambda tx: rows.get(tx, name))
        return Namespace(name, labels or {})

    async def find(self) -> list[Namespace]:
        """All namespaces, by name."""
        return [Namespace(*row) for row in await self._db.read(rows.list_all)]

    async def create(self, namespace: Namespace) -> Namespace:
        """Make a namespace.

        Raises:
            AlreadyExists: the name is taken.
            InvalidArgument: the name or a label is malformed.
        """
        name = checked_identifier(namespace.name, what="namespace", field="namespace.name")
        labels = checked_labels(namespace.labels)

        def record(tx: sqlite3.Connection) -> None:
            if not rows.insert(tx, name, labels):
                raise AlreadyExists(
                    f"namespace {name!r} exists already", resource=("namespace", name)
                )
            self._tell(tx, "create", name, labels)

        await self._db.write(record)
        return Namespace(name, labels)

    async def update(self, namespace: Namespace, fields: Sequence[str] = ()) -> Namespace:
        """Change a namespace's labels; one that does not exist comes to be, as upstream has it.

        Args:
            namespace: the new values.
            fields: field mask paths ``labels`` and ``labels.<name>``; empty replaces all labels.

        Raises:
            InvalidArgument: the name, a path or a label is malformed.
        """
        name = checked_identifier(namespace.name, what="namespace", field="namespace.name")

        def change(tx: sqlite3.Connection) -> Namespace:
            labels = dict(rows.get(tx, name) or {})
            for path in fields or ("labels",):
                if path == "labels":
                    labels = dict(namespace.labels)
                elif path.startswith("labels."):
                    key = path.removeprefix("labels.")
                    labels[key] = namespace.labels.get(key, "")
                else:
                    raise InvalidArgument(
                        f"field {path!r} of a namespace cannot be changed: only labels can",
                        field="update_mask",
                    )
            labels = checked_labels(labels)
            rows.set_labels(tx, name, labels)
            self._tell(tx, "update", name, labels)
            return Namespace(name, labels)

        return await self._db.write(change)

    async def delete(self, name: str) -> None:
        """Remove an empty namespace, with its leases.

        Raises:
            NotFound: there is none of that name.
            NamespaceInUse: it holds something.
        """

        def forget(tx: sqlite3.Connection) -> None:
            if held := rows.contents(tx, name):
                raise NamespaceInUse(
                    f"namespace {name!r} must be empty, but it still has {', '.join(held)}",
                    resource=("namespace", name),
                )
            if not rows.delete(tx, name):
                raise NotFound(f"namespace {name!r} does not exist", resource=("namespace", name))
            self._events.append(
                tx,
                name,
                "/namespaces/delete",
                "containerd.events.NamespaceDelete",
                {"name": name},
            )

        await self._db.write(forget)

    def _tell(
        self, tx: sqlite3.Connection, verb: str, name: str, labels: Mapping[str, str]
    ) -> None:
        self._events.append(
            tx,
            name,
            f"/namespaces/{verb}",
            f"containerd.events.Namespace{verb.title()}",
            {"name": name, "labels": labels},
        )
