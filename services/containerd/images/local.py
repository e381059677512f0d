"""Images as rows of the database."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from services.common.errors import AlreadyExists, InvalidArgument, NotFound
from services.containerd.content.descriptor import Descriptor
from services.containerd.content.digest import split_digest
from services.containerd.content.labels import checked_labels
from services.containerd.filters import map_field, parse
from services.containerd.images.store import Image
from services.containerd.leases.lease import EXPIRE_LABEL, IMAGES, current_lease
from services.containerd.metadata import images as rows
from services.containerd.metadata import leases

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from services.common.database import Database
    from services.containerd.events.sink import EventSink
    from services.containerd.gc.mutations import Mutations


class LocalImageStore:
    """The images of a node. See :class:`ImageStore` for the contract.

    Args:
        db: the open database.
        events: where what happens to images is told.
        mutations: told of every change.
        collect: collects garbage now, for deletions that wait for it.
    """

    def __init__(
        self,
        db: Database,
        events: EventSink,
        *,
        mutations: Mutations,
        collect: Callable[[], Awaitable[object]],
    ) -> None:
        self._db = db
        self._events = events
        self._mutations = mutations
        self._collect = collect

    async def get(self, namespace: str, name: str) -> Image:
        """See :class:`ImageStore`."""
        return self._db.look(lambda tx: _require(tx, namespace, name))

    async def find(self, namespace: str, filters: Sequence[str] = ()) -> list[Image]:
        """See :class:`ImageStore`."""
        wanted = parse(filters)
        found = await self._db.read(lambda tx: rows.list_all(tx, namespace))
        return [image for image in map(_from_row, found) if wanted.matches(_fields(image))]

    async def create(self, namespace: str, image: Image) -> Image:
        """See :class:`ImageStore`."""
        lease = current_lease.get()
        now_ns = image.created_at_ns or time.time_ns()
        new = _checked(replace(image, created_at_ns=now_ns, updated_at_ns=now_ns))

        def record(tx: sqlite3.Connection) -> None:
            if rows.get(tx, namespace, new.name) is not None:
                raise AlreadyExists(
                    f"image {new.name!r} exists already", resource=("image", new.name)
                )
            self._record(tx, namespace, new, lease, verb="create")

        await self._db.write(record)
        self._mutations.changed()
        return new

    async def update(self, namespace: str, image: Image, fields: Sequence[str] = ()) -> Image:
        """See :class:`ImageStore`."""
        if not image.name:
            raise InvalidArgument("an image name is needed for an update", field="image.name")
        lease = current_lease.get()
        now_ns = image.updated_at_ns or time.time_ns()

        def change(tx: sqlite3.Connection) -> Image:
            old = _require(tx, namespace, image.name)
            new = _masked(old, image, fields)
            new = replace(new, created_at_ns=old.created_at_ns, updated_at_ns=now_ns)
            new = _checked(new)
            self._record(tx, namespace, new, lease, verb="update")
            return new

        updated = await self._db.write(change)
        self._mutations.changed()
        return updated

    async def put(self, namespace: str, image: Image) -> Image:
        """See :class:`ImageStore`."""
        lease = current_lease.get()
        now_ns = time.time_ns()

        def record(tx: sqlite3.Connection) -> Image:
            row = rows.get(tx, namespace, image.name)
            old = None if row is None else _from_row(row)
            new = replace(
                image,
                labels={**(old.labels if old else {}), **image.labels},
                created_at_ns=old.created_at_ns if old else now_ns,
                updated_at_ns=now_ns,
            )
            new = _checked(new)
            self._record(tx, namespace, new, lease, verb="update" if old else "create")
            return new

        recorded = await self._db.write(record)
        self._mutations.changed()
        return recorded

    async def delete(
        self, namespace: str, name: str, *, target_digest: str = "", sync: bool = False
    ) -> None:
        """See :class:`ImageStore`."""

        def forget(tx: sqlite3.Connection) -> None:
            image = _require(tx, namespace, name)
            if target_digest and image.target.digest != target_digest:
                raise NotFound(
                    f"image {name!r} has target {image.target.digest}, not {target_digest}",
                    resource=("image", name),
                )
            rows.delete(tx, namespace, name)
            leases.forget_resource(tx, namespace, IMAGES, name)
            self._events.append(
                tx,
                namespace,
                "/images/delete",
                "containerd.services.images.v1.ImageDelete",
                {"name": name},
            )

        await self._db.write(forget)
        self._mutations.deleted()
        if sync:
            await self._collect()

    def _record(
        self, tx: sqlite3.Connection, namespace: str, image: Image, lease: str, *, verb: str
    ) -> None:
        rows.put(
            tx,
            namespace,
            image.name,
            media_type=image.target.media_type,
            digest=image.target.digest,
            size_bytes=image.target.size_bytes,
            annotations=image.target.annotations,
            labels=image.labels,
            created_at_ns=image.created_at_ns,
            updated_at_ns=image.updated_at_ns,
        )
        # Only an image that expires can be garbage while it has its name.
        if EXPIRE_LABEL in image.labels:
            leases.add_resource(tx, namespace, lease, IMAGES, image.name)
        self._events.append(
            tx,
            namespace,
            f"/images/{verb}",
            f"containerd.services.images.v1.Image{verb.title()}",
            {"name": image.name, "labels": image.labels},
        )


def _require(tx: sqlite3.Connection, namespace: str, name: str) -> Image:
    row = rows.get(tx, namespace, name)
    if row is None:
        raise NotFound(
            f"image {name!r} does not exist in namespace {namespace!r}", resource=("image", name)
        )
    return _from_row(row)


def _masked(old: Image, new: Image, fields: Sequence[str]) -> Image:
    if not fields:
        return new
    target, labels = old.target, dict(old.labels)
    annotations = dict(old.target.annotations)
    for path in fields:
        name, _, key = path.partition(".")
        if path == "target":
            target = new.target
            annotations = dict(new.target.annotations)
        elif path == "labels":
            labels = dict(new.labels)
        elif path == "annotations":
            annotations = dict(new.target.annotations)
        elif name == "labels":
            labels[key] = new.labels.get(key, "")
        elif name == "annotations":
            annotations[key] = new.target.annotations.get(key, "")
        else:
            raise InvalidArgument(
                f"field {path!r} of image {old.name!r} cannot be changed: "
                "target, labels and annotations can",
                field="update_mask",
            )
    return replace(old, target=replace(target, annotations=annotations), labels=labels)


def _checked(image: Image) -> Image:
    if not image.name:
        raise InvalidArgument("an image name must not be empty", field="image.name")
    split_digest(image.target.digest, field="image.target.digest")
    if image.target.size_bytes <= 0:
        raise InvalidArgument(
            f"image {image.name!r} has a target of {image.target.size_bytes} bytes: "
            "the size must be greater than zero",
            field="image.target.size",
        )
    if not image.target.media_type:
        raise InvalidArgument(
            f"image {image.name!r} has a target without a media type",
            field="image.target.media_type",
        )
    annotations = {key: value for key, value in image.target.annotations.items() if value}
    return replace(
        image,
        labels=checked_labels(image.labels),
        target=replace(image.target, annotations=annotations),
    )


def _fields(image: Image) -> Callable[[Sequence[str]], str | None]:
    target = {"digest": image.target.digest, "mediatype": image.target.media_type}
    maps: dict[str, Mapping[str, str]] = {
        "labels": image.labels,
        "annotations": image.target.annotations,
    }

    def value(path: Sequence[str]) -> str | None:
        if path[0] == "name":
            return image.name
        if path[0] == "target":
            return target.get(path[1]) if len(path) > 1 else None
        return map_field(maps[path[0]], path[1:]) if path[0] in maps else None

    return value


def _from_row(row: sqlite3.Row) -> Image:
    return Image(
        name=row["name"],
        target=Descriptor(
            media_type=row["media_type"],
            digest=row["digest"],
            size_bytes=row["size_bytes"],
            annotations=json.loads(row["annotations"]),
        ),
        labels=json.loads(row["labels"]),
        created_at_ns=row["created_at_ns"],
        updated_at_ns=row["updated_at_ns"],
    )
