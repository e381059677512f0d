"""All container records: in memory for readers, in the database for good.

A change is a plain function from a record to the next one, applied to the row inside the
transaction, so that changes from a call and from containerd's journal never overwrite one another.
Memory follows the disk: it shows a record only after its commit. Whoever waits for a change waits
here.

A container whose removal has begun is gone for users: its tombstone answers those who wait for it.
The record stays until nothing is left of it, for those who see to that (:meth:`ContainerStore.get`,
:meth:`ContainerStore.leaving`).
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from services.common.errors import AlreadyExists, NotFound
from services.daemon.containers import codec, names
from services.daemon.containers.outliving import OutlivingWork
from services.daemon.containers.record import ContainerId, ContainerRecord, Tombstone
from services.daemon.images.image import ImageUser
from services.daemon.metadata import containers as rows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from services.common.database import Database, Transaction
    from services.daemon.images.image import ImageId

T = TypeVar("T")

_SHORT_ID = 12
TOMBSTONE_NS = 3600 * 1_000_000_000


class ContainerStore:
    """The records of one engine.

    Args:
        db: opened with the migrations of :mod:`services.daemon.metadata.schema`.
    """

    def __init__(self, db: Database) -> None:
        self._db = db
        self._commits = OutlivingWork()
        self._records: dict[ContainerId, ContainerRecord] = {}
        self._leaving: dict[ContainerId, ContainerRecord] = {}
        self._by_name: dict[str, str] = {}
        self._tombstones: dict[ContainerId, Tombstone] = {}
        self._waiters: dict[ContainerId, set[asyncio.Event]] = {}

    async def load(self) -> None:
        """Read everything; call once, first."""
        before_ns = time.time_ns() - TOMBSTONE_NS
        await self._db.write(lambda tx: rows.delete_tombstones(tx, before_ns=before_ns))
        for tombstone_row in await self._db.read(rows.list_tombstones):
            tombstone = codec.tombstone(tombstone_row)
            self._tombstones[tombstone.id] = tombstone
        for row in await self._db.read(rows.list_all):
            record = codec.container_record(row)
            if record.id in self._tombstones:
                self._leaving[record.id] = record
            else:
                self._publish(record)

    def find(self, reference: str) -> ContainerRecord:
        """The container that a user calls so: id, name, or unique prefix of the id.

        Raises:
            NotFound: there is none.
            InvalidArgument: several have the prefix.
        """
        identity = names.find(reference, ids=self._records, by_name=self._by_name)
        return self._records[ContainerId(identity)]

    def find_tombstone(self, reference: str) -> Tombstone | None:
        """What is kept of a removed container that a user calls so, the latest of that name."""
        wanted = reference.removeprefix("/")
        for tombstone in reversed(self._tombstones.values()):
            if tombstone.name == wanted:
                return tombstone
            if len(wanted) >= _SHORT_ID and tombstone.id.startswith(wanted):
                return tombstone
        return None

    def get(self, container_id: ContainerId) -> ContainerRecord | None:
        """The record of an id, or None; of a container that is being removed, too."""
        return self._records.get(container_id) or self._leaving.get(container_id)

    def require(self, container_id: ContainerId) -> ContainerRecord:
        """The record of an id.

        Raises:
            NotFound: it has been removed.
        """
        record = self._records.get(container_id)
        if record is None:
            raise NotFound(
                f"No such container: {container_id}", resource=("container", container_id)
            )
        return record

    def tombstone(self, container_id: ContainerId) -> Tombstone | None:
        """What is kept of a removed container, or None."""
        return self._tombstones.get(container_id)

    def list_all(self) -> list[ContainerRecord]:
        """All containers, newest first."""
        return sorted(self._records.values(), key=lambda record: -record.created_at_ns)

    def leaving(self) -> list[ContainerRecord]:
        """The containers of whose removal something is left to do."""
        return list(self._leaving.values())

    def users_of(self, image_id: ImageId) -> list[ImageUser]:
        """The containers that were made from an image."""
        made = (record for record in self._records.values() if record.image.id == image_id)
        return [ImageUser(record.id, record.live) for record in made]

    async def add(
        self, record: ContainerRecord, *, also: Callable[[Transaction], None] | None = None
    ) -> None:
        """Record a new container.

        Raises:
            AlreadyExists: its name is taken.
        """

        def insert(tx: Transaction) -> ContainerRecord:
            owner = rows.name_owner(tx, record.name)
            if owner:
                raise AlreadyExists(
                    f'Conflict. The container name "/{record.name}" is already in use by '
                    f'container "{owner}". You have to remove (or rename) that container to be '
                    "able to reuse that name.",
                    field="name",
                    resource=("container", owner),
                )
            rows.insert(tx, codec.container_row(record))
            if also is not None:
                also(tx)
            return record

        await self._commit(insert, self._publish)

    async def change(
        self,
        container_id: ContainerId,
        change: Callable[[ContainerRecord], ContainerRecord | None],
        *,
        also: Callable[[Transaction], None] | None = None,
    ) -> ContainerRecord:
        """Change a record; returns it as it is then.

        Args:
            container_id: whose.
            change: from the present record to the next; None leaves it. May raise to refuse.
            also: further writes of the same transaction.

        Raises:
            NotFound: it has been removed.
        """

        def apply(tx: Transaction) -> ContainerRecord:
            changed = self.change_in(tx, container_id, change)
            if changed is None:
                raise NotFound(
                    f"No such container: {container_id}", resource=("container", container_id)
                )
            if also is not None:
                also(tx)
            return changed

        return await self._commit(apply, self._publish)

    def change_in(
        self,
        tx: Transaction,
        container_id: ContainerId,
        change: Callable[[ContainerRecord], ContainerRecord | None],
    ) -> ContainerRecord | None:
        """As :meth:`change`, as a part of somebody else's transaction.

        The caller hands the result to :meth:`publish` after the commit. None: no such container.
        """
        row = rows.get(tx, container_id)
        if row is None:
            return None
        present = codec.container_record(row)
        following = change(present)
        if following is None or following == present:
            return present
        following = dataclasses.replace(following, revision=present.revision + 1)
        rows.update(tx, codec.container_row(following))
        return following

    async def retire(
        self,
        container_id: ContainerId,
        change: Callable[[ContainerRecord], ContainerRecord | None],
    ) -> ContainerRecord:
        """As :meth:`change`, to the state of removal; for users there is the tombstone from now on.

        One transaction: after a crash the container is there as before, or it is gone for users
        and its removal goes on.
        """

        def apply(tx: Transaction) -> tuple[ContainerRecord, Tombstone | None]:
            row = rows.get(tx, container_id)
            retired = self.change_in(tx, container_id, change)
            if row is None or retired is None:
                raise NotFound(
                    f"No such container: {container_id}", resource=("container", container_id)
                )
            if rows.has_tombstone(tx, container_id):
                return retired, None
            tombstone = Tombstone(container_id, row.name, retired.exit, time.time_ns())
            rows.put_tombstone(tx, codec.tombstone_row(tombstone))
            rows.delete_tombstones(tx, before_ns=tombstone.removed_at_ns - TOMBSTONE_NS)
            return retired, tombstone

        def show(applied: tuple[ContainerRecord, Tombstone | None]) -> None:
            retired, tombstone = applied
            if tombstone is not None:
                self._leaving[container_id] = retired
                self._unpublish(tombstone)

        retired, _ = await self._commit(apply, show)
        return retired

    async def bury(self, container_id: ContainerId) -> None:
        """Forget a container that is retired, the last step of its removal."""

        def show(_: None) -> None:
            self._leaving.pop(container_id, None)

        await self._commit(lambda tx: rows.delete(tx, container_id), show)

    def publish(self, record: ContainerRecord) -> None:
        """Show a record that was committed; an older revision than the one shown is ignored."""
        self._publish(record)

    @contextmanager
    def watching(self, container_id: ContainerId) -> Iterator[asyncio.Event]:
        """An event that is set at every change of a container; the watcher clears it."""
        event = asyncio.Event()
        watchers = self._waiters.setdefault(container_id, set())
        watchers.add(event)
        try:
            yield event
        finally:
            watchers.discard(event)
            if not watchers and self._waiters.get(container_id) is watchers:
                del self._waiters[container_id]

    async def until(
        self, container_id: ContainerId, condition: Callable[[ContainerRecord], bool]
    ) -> ContainerRecord | None:
        """Wait until a record meets ``condition``; None when the container is removed first."""
        with self.watching(container_id) as changed:
            while True:
                record = self._records.get(container_id)
                if record is None or condition(record):
                    return record
                await changed.wait()
                changed.clear()

    async def close(self) -> None:
        """Wait until everything that was committed is shown."""
        await self._commits.close()

    async def _commit(self, write: Callable[[Transaction], T], show: Callable[[T], None]) -> T:
        """Commit, then show the result, even if the caller is cancelled between the two."""

        async def work() -> T:
            result = await self._db.write(write)
            show(result)
            return result

        return await self._commits.run(work(), name="container-commit")

    def _publish(self, record: ContainerRecord) -> None:
        if record.id in self._leaving:
            self._leaving[record.id] = record
            return
        present = self._records.get(record.id)
        if record.id in self._tombstones or (
            present is not None and present.revision > record.revision
        ):
            return
        if present is not None and self._by_name.get(present.name) == record.id:
            del self._by_name[present.name]
        self._records[record.id] = record
        self._by_name[record.name] = record.id
        self._notify(record.id)

    def _unpublish(self, tombstone: Tombstone) -> None:
        record = self._records.pop(tombstone.id, None)
        if record is not None and self._by_name.get(record.name) == record.id:
            del self._by_name[record.name]
        self._tombstones[tombstone.id] = tombstone
        horizon_ns = tombstone.removed_at_ns - TOMBSTONE_NS
        for old in [t for t in self._tombstones.values() if t.removed_at_ns < horizon_ns]:
            del self._tombstones[old.id]
        self._notify(tombstone.id)

    def _notify(self, container_id: ContainerId) -> None:
        for event in self._waiters.get(container_id, ()):
            event.set()
