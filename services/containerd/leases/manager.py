"""Leases as rows of the database."""

from __future__ import annotations

import json
import secrets
import time
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import structlog

from services.common.errors import AlreadyExists, InvalidArgument, NotFound, Unimplemented
from services.containerd.content.digest import split_digest
from services.containerd.content.labels import checked_labels
from services.containerd.filters import map_field, parse
from services.containerd.leases.lease import (
    CONTENT,
    EPOCH_LABEL,
    EXPIRE_LABEL,
    IMAGES,
    INGESTS,
    SNAPSHOTS_PREFIX,
    Lease,
    Resource,
    current_lease,
)
from services.containerd.metadata import leases as rows
from services.containerd.uninterrupted import uninterrupted

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence

    from services.common.database import Database
    from services.containerd.gc.mutations import Mutations

log = structlog.get_logger(__name__)


class LeaseManager:
    """The leases of a node. See :class:`Leases` for the contract.

    Args:
        db: the open database.
        mutations: told of every change.
    """

    def __init__(self, db: Database, *, mutations: Mutations) -> None:
        self._db = db
        self._mutations = mutations
        self._epoch = 0

    async def begin(self, epoch: int) -> None:
        """Count as held from now on what is held in this start of containerd.

        What an earlier one held, that was killed, is dropped: nobody is there to end it.
        """
        self._epoch = epoch

        def drop(tx: sqlite3.Connection) -> list[str]:
            dropped = []
            for row in rows.list_labelled(tx, EPOCH_LABEL):
                if json.loads(row["labels"]).get(EPOCH_LABEL) not in (None, str(epoch)):
                    rows.delete(tx, row["namespace"], row["id"])
                    dropped.append(row["id"])
            return dropped

        if dropped := await self._db.write(drop):
            log.info("leases of an earlier start dropped", leases=dropped)

    @asynccontextmanager
    async def hold(self, namespace: str, *, expires_s: float = 24 * 3600) -> AsyncIterator[Lease]:
        """See :class:`Leases`."""
        if outer := current_lease.get():
            yield Lease(outer)
            return
        expires_at = datetime.fromtimestamp(time.time() + expires_s, UTC)
        lease = await self.create(
            namespace,
            labels={
                EXPIRE_LABEL: expires_at.isoformat(timespec="seconds"),
                EPOCH_LABEL: str(self._epoch),
            },
        )
        current_lease.set(lease.id)
        try:
            yield lease
        finally:
            # There was none before. A token would not do: a generator may end in another context.
            current_lease.set("")
            try:
                await uninterrupted(self.delete(namespace, lease.id))
            except NotFound:
                log.warning("lease was gone before its end", lease=lease.id, namespace=namespace)

    async def create(
        self, namespace: str, lease_id: str = "", labels: Mapping[str, str] | None = None
    ) -> Lease:
        """See :class:`Leases`."""
        lease_id = lease_id or f"{time.time_ns()}-{secrets.token_hex(4)}"
        checked = checked_labels(labels or {})
        now_ns = time.time_ns()

        def record(tx: sqlite3.Connection) -> None:
            if not rows.insert(tx, namespace, lease_id, checked, now_ns=now_ns):
                raise AlreadyExists(
                    f"lease {lease_id!r} exists already", resource=("lease", lease_id)
                )

        await self._db.write(record)
        self._mutations.changed()
        return Lease(lease_id, checked, now_ns)

    async def delete(self, namespace: str, lease_id: str) -> None:
        """See :class:`Leases`."""

        def forget(tx: sqlite3.Connection) -> None:
            rows.require(tx, namespace, lease_id)
            rows.delete(tx, namespace, lease_id)

        await self._db.write(forget)
        self._mutations.deleted()

    async def find(self, namespace: str, filters: Sequence[str] = ()) -> list[Lease]:
        """See :class:`Leases`."""
        wanted = parse(filters)
        found = await self._db.read(lambda tx: rows.list_all(tx, namespace))
        leases = [
            Lease(row["id"], json.loads(row["labels"]), row["created_at_ns"]) for row in found
        ]
        return [lease for lease in leases if wanted.matches(_fields(lease))]

    async def add(self, namespace: str, lease_id: str, resource: Resource) -> None:
        """See :class:`Leases`."""
        _check_resource(resource)

        def record(tx: sqlite3.Connection) -> None:
            rows.require(tx, namespace, lease_id)
            rows.add_resource(tx, namespace, lease_id, resource.type, resource.id)

        await self._db.write(record)
        self._mutations.changed()

    async def remove(self, namespace: str, lease_id: str, resource: Resource) -> None:
        """See :class:`Leases`."""
        _check_resource(resource)

        def forget(tx: sqlite3.Connection) -> None:
            rows.require(tx, namespace, lease_id)
            rows.remove_resource(tx, namespace, lease_id, resource.type, resource.id)

        await self._db.write(forget)
        self._mutations.deleted()

    async def resources(self, namespace: str, lease_id: str) -> list[Resource]:
        """See :class:`Leases`."""

        def read(tx: sqlite3.Connection) -> list[sqlite3.Row]:
            rows.require(tx, namespace, lease_id)
            return rows.resources(tx, namespace, lease_id)

        return [Resource(row["type"], row["id"]) for row in await self._db.read(read)]

    # What stores call inside of their transactions.

    def current(self) -> str:
        """The lease that the calling task works under; empty if there is none."""
        return current_lease.get()

    def attach(
        self, tx: sqlite3.Connection, namespace: str, lease: str, kind: str, resource: str
    ) -> None:
        """Put a resource under a lease, again if need be; none if ``lease`` is empty.

        Raises:
            NotFound: there is no such lease.
        """
        rows.add_resource(tx, namespace, lease, kind, resource)

    def detach(self, tx: sqlite3.Connection, namespace: str, kind: str, resource: str) -> None:
        """Take a resource, which is no more, from every lease of the namespace."""
        rows.forget_resource(tx, namespace, kind, resource)


def _fields(lease: Lease) -> Callable[[Sequence[str]], str | None]:
    def value(path: Sequence[str]) -> str | None:
        if path[0] == "id":
            return lease.id
        return map_field(lease.labels, path[1:]) if path[0] == "labels" else None

    return value


def _check_resource(resource: Resource) -> None:
    kind, separator, snapshotter = resource.type.partition("/")
    if kind in (CONTENT, INGESTS, IMAGES):
        if separator:
            raise InvalidArgument(
                f"resource type {resource.type!r} is malformed: {kind} has no parts",
                field="resource.type",
            )
        if kind == CONTENT:
            split_digest(resource.id, field="resource.id")
    elif kind == SNAPSHOTS_PREFIX.rstrip("/"):
        if not snapshotter or "/" in snapshotter:
            raise InvalidArgument(
                f"resource type {resource.type!r} is malformed: want snapshots/<snapshotter>",
                field="resource.type",
            )
    else:
        raise Unimplemented(f"leases do not keep resources of type {resource.type!r}")
