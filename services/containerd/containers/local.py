"""Container records as rows of the database."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from services.common.errors import AlreadyExists, InvalidArgument, NotFound
from services.containerd.containers.store import Container
from services.containerd.content.labels import checked_labels
from services.containerd.filters import map_field, parse
from services.containerd.identifiers import checked_identifier
from services.containerd.metadata import containers as rows
from services.containerd.typed import (
    NO_VALUE,
    from_columns,
    from_json,
    to_columns,
    to_plain,
)

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Sequence

    from services.common.database import Database
    from services.containerd.events.sink import EventSink
    from services.containerd.gc.mutations import Mutations

_CHANGEABLE = ("labels", "spec", "extensions", "image", "snapshotkey")


class LocalContainerStore:
    """The container records of a node. See :class:`ContainerStore` for the contract.

    Args:
        db: the open database.
        events: where what happens to containers is told.
        mutations: told of every change.
    """

    def __init__(self, db: Database, events: EventSink, *, mutations: Mutations) -> None:
        self._db = db
        self._events = events
        self._mutations = mutations

    async def get(self, namespace: str, container_id: str) -> Container:
        """See :class:`ContainerStore`."""
        return self._db.look(lambda tx: _require(tx, namespace, container_id))

    async def require(self, namespace: str, container_id: str) -> None:
        """See :class:`ContainerStore`."""
        if not self._db.look(lambda tx: rows.exists(tx, namespace, container_id)):
            raise _not_found(namespace, container_id)

    async def find(self, namespace: str, filters: Sequence[str] = ()) -> list[Container]:
        """See :class:`ContainerStore`."""
        wanted = parse(filters)
        found = await self._db.read(lambda tx: rows.list_all(tx, namespace))
        return [item for item in map(_from_row, found) if wanted.matches(_fields(item))]

    async def create(self, namespace: str, container: Container) -> Container:
        """See :class:`ContainerStore`."""
        now_ns = time.time_ns()
        new = _checked(replace(container, created_at_ns=now_ns, updated_at_ns=now_ns))

        def record(tx: sqlite3.Connection) -> None:
            if rows.get(tx, namespace, new.id) is not None:
                raise AlreadyExists(
                    f"container {new.id!r} exists already", resource=("container", new.id)
                )
            _put(tx, namespace, new)
            self._events.append(
                tx,
                namespace,
                "/containers/create",
                "containerd.events.ContainerCreate",
                {
                    "id": new.id,
                    "image": new.image,
                    "runtime": {"name": new.runtime_name, "options": new.runtime_options},
                },
            )

        await self._db.write(record)
        self._mutations.changed()
        return new

    async def update(
        self, namespace: str, container: Container, fields: Sequence[str] = ()
    ) -> Container:
        """See :class:`ContainerStore`."""
        if not container.id:
            raise InvalidArgument("a container id is needed for an update", field="container.id")

        def change(tx: sqlite3.Connection) -> Container:
            old = _require(tx, namespace, container.id)
            if not fields:
                _require_same(old, container)
            new = _masked(old, container, fields or _CHANGEABLE)
            new = _checked(replace(new, updated_at_ns=time.time_ns()))
            _put(tx, namespace, new)
            self._events.append(
                tx,
                namespace,
                "/containers/update",
                "containerd.events.ContainerUpdate",
                {
                    "id": new.id,
                    "image": new.image,
                    "labels": new.labels,
                    "snapshot_key": new.snapshot_key,
                },
            )
            return new

        updated = await self._db.write(change)
        self._mutations.changed()
        return updated

    async def delete(self, namespace: str, container_id: str) -> None:
        """See :class:`ContainerStore`."""

        def forget(tx: sqlite3.Connection) -> None:
            if not rows.delete(tx, namespace, container_id):
                raise _not_found(namespace, container_id)
            self._events.append(
                tx,
                namespace,
                "/containers/delete",
                "containerd.events.ContainerDelete",
                {"id": container_id},
            )

        await self._db.write(forget)
        self._mutations.deleted()


def _not_found(namespace: str, container_id: str) -> NotFound:
    return NotFound(
        f"container {container_id!r} does not exist in namespace {namespace!r}",
        resource=("container", container_id),
    )


def _require(tx: sqlite3.Connection, namespace: str, container_id: str) -> Container:
    row = rows.get(tx, namespace, container_id)
    if row is None:
        raise _not_found(namespace, container_id)
    return _from_row(row)


def _require_same(old: Container, new: Container) -> None:
    for name, before, after in (
        ("snapshotter", old.snapshotter, new.snapshotter),
        ("runtime.name", old.runtime_name, new.runtime_name),
    ):
        if before != after:
            raise InvalidArgument(
                f"field {name} of container {old.id!r} is {before!r} and cannot become {after!r}",
                field=f"container.{name}",
            )


def _masked(old: Container, new: Container, fields: Sequence[str]) -> Container:
    result = old
    for path in fields:
        name, separator, key = path.partition(".")
        if separator and name == "labels":
            labels = {**result.labels, key: new.labels.get(key, "")}
            result = replace(result, labels=labels)
        elif separator and name == "extensions":
            extensions = {**result.extensions, key: new.extensions.get(key, NO_VALUE)}
            result = replace(result, extensions=extensions)
        elif path == "labels":
            result = replace(result, labels=new.labels)
        elif path == "spec":
            result = replace(result, spec=new.spec)
        elif path == "extensions":
            result = replace(result, extensions=new.extensions)
        elif path == "image":
            result = replace(result, image=new.image)
        elif path == "snapshotkey":
            result = replace(result, snapshot_key=new.snapshot_key)
        else:
            raise InvalidArgument(
                f"field {path!r} of container {old.id!r} cannot be changed: "
                f"{', '.join(_CHANGEABLE)} can",
                field="update_mask",
            )
    return result


def _checked(container: Container) -> Container:
    checked_identifier(container.id, what="container id", field="container.id")
    if "" in container.extensions:
        raise InvalidArgument(
            f"container {container.id!r} has an extension without a name",
            field="container.extensions",
        )
    if not container.runtime_name:
        raise InvalidArgument(
            f"container {container.id!r} names no runtime: try io.containerd.runc.v2",
            field="container.runtime.name",
        )
    if container.spec is None:
        raise InvalidArgument(f"container {container.id!r} has no spec", field="container.spec")
    if container.snapshot_key and not container.snapshotter:
        raise InvalidArgument(
            f"container {container.id!r} names snapshot {container.snapshot_key!r}, "
            "but no snapshotter",
            field="container.snapshotter",
        )
    extensions = {name: value for name, value in container.extensions.items() if value != NO_VALUE}
    return replace(container, labels=checked_labels(container.labels), extensions=extensions)


def _fields(container: Container) -> Callable[[Sequence[str]], str | None]:
    def value(path: Sequence[str]) -> str | None:
        if path[0] == "labels":
            return map_field(container.labels, path[1:])
        if path[0] == "id":
            return container.id
        if path[0] == "image":
            return container.image or None
        return container.runtime_name if list(path[:2]) == ["runtime", "name"] else None

    return value


def _put(tx: sqlite3.Connection, namespace: str, container: Container) -> None:
    rows.put(
        tx,
        namespace,
        container.id,
        labels=container.labels,
        image=container.image,
        runtime_name=container.runtime_name,
        runtime_options=to_columns(container.runtime_options),
        spec=to_columns(container.spec),
        snapshotter=container.snapshotter,
        snapshot_key=container.snapshot_key,
        extensions=to_plain(container.extensions),
        sandbox=container.sandbox,
        created_at_ns=container.created_at_ns,
        updated_at_ns=container.updated_at_ns,
    )


def _from_row(row: sqlite3.Row) -> Container:
    return Container(
        id=row["id"],
        runtime_name=row["runtime_name"],
        runtime_options=from_columns(row["runtime_options_type"], row["runtime_options"]),
        spec=from_columns(row["spec_type"], row["spec"]),
        image=row["image"],
        snapshotter=row["snapshotter"],
        snapshot_key=row["snapshot_key"],
        labels=json.loads(row["labels"]),
        extensions=from_json(row["extensions"]),
        sandbox=row["sandbox"],
        created_at_ns=row["created_at_ns"],
        updated_at_ns=row["updated_at_ns"],
    )
