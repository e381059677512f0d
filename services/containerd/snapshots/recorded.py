"""What every snapshotter has in common: rows, labels, leases and events.

A subclass says where the files are. It makes them before the row and takes them away after it:

* **prepare** calls ``_make``, and ``_make_quickly`` in the transaction that writes the row. Crash
  before that is committed: files without a row, which the subclass' ``cleanup`` takes away.
* **commit** calls ``_finish``, which brings the files to the disk, then changes the row. Crash
  between: the snapshot is still active, and can be committed again.
* **remove** deletes the row, then calls ``_discard``, which may remove files behind the answer.
  Crash between, or a failure: rubbish for ``cleanup``.

Ids are counted in memory, in one sequence for all snapshotters of a database, because files must
have their name before there is a row.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from services.common.errors import AlreadyExists, FailedPrecondition, InvalidArgument
from services.common.frozen import frozen
from services.containerd.content.labels import checked_labels
from services.containerd.gc.mutations import UNHEARD
from services.containerd.metadata import snapshots as rows
from services.containerd.snapshots.snapshotter import Kind, SnapshotInfo, Usage
from services.containerd.uninterrupted import uninterrupted

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Mapping, Sequence

    from services.common.database import Database
    from services.common.mounts import Mount
    from services.containerd.events.sink import EventSink
    from services.containerd.gc.mutations import Mutations
    from services.containerd.snapshots.collaborators import SnapshotLeases

TARGET_LABEL = "containerd.io/snapshot.ref"
"""On a prepare: the committed snapshot that it is meant to become; if that exists, so it says."""


class SnapshotIds:
    """Numbers that no snapshot has, or ever had."""

    def __init__(self) -> None:
        self._highest = 0

    def pass_by(self, numbers: Sequence[int]) -> None:
        """Never give any of those."""
        self._highest = max(self._highest, *numbers, 0)

    def take(self) -> int:
        """The next one."""
        self._highest += 1
        return self._highest


@frozen
class NewSnapshot:
    """A snapshot on its way to get a row; ``parent`` is None on nothing."""

    id: int
    namespace: str
    key: str
    kind: Kind
    parent: rows.SnapshotRow | None
    labels: Mapping[str, str]


class RecordedSnapshotter(ABC):
    """A snapshotter whose records are rows. See :class:`Snapshotter` for the contract.

    Args:
        db: the open database.
        events: where what happens to snapshots is told.
        leases: what keeps snapshots from the collector.
        ids: shared by all snapshotters of the database; None: there is but this one.
        mutations: told of every change.
        trace: called with the name of each step that a crash may follow, for tests.
    """

    name: str
    capabilities: tuple[str, ...] = ()

    def __init__(
        self,
        db: Database,
        *,
        events: EventSink,
        leases: SnapshotLeases,
        ids: SnapshotIds | None = None,
        mutations: Mutations = UNHEARD,
        trace: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._db = db
        self._events = events
        self._leases = leases
        self._ids = ids or SnapshotIds()
        self._mutations = mutations
        self._trace = trace
        self._being_made: set[int] = set()

    @abstractmethod
    async def open(self) -> None:
        """Bring files and rows into step after a start. Call it once, before anything else."""

    @abstractmethod
    async def cleanup(self) -> None:
        """See :class:`Snapshotter`."""

    @abstractmethod
    async def _make(self, new: NewSnapshot) -> str:
        """Make the files of a snapshot; returns what its row says of where they are."""

    @abstractmethod
    def _make_quickly(self, new: NewSnapshot) -> None:
        """Make files that take no time. Blocks; a part of the transaction that writes the row."""

    @abstractmethod
    async def _unmake(self, new: NewSnapshot) -> None:
        """Undo ``_make``, whole or half done. What cannot be undone is left to ``cleanup``."""

    @abstractmethod
    async def _mounts(self, row: rows.SnapshotRow, ancestors: Sequence[int]) -> list[Mount]:
        """The mounts of an active snapshot or a view on ancestors, nearest first."""

    @abstractmethod
    async def _measure(self, row: rows.SnapshotRow) -> Usage:
        """What an active snapshot takes."""

    @abstractmethod
    async def _finish(
        self, row: rows.SnapshotRow, parent: rows.SnapshotRow | None, labels: Mapping[str, str]
    ) -> tuple[Usage, str]:
        """Bring an active snapshot to the disk, to be changed no more.

        ``parent`` is the new one of a snapshot that had none; None: it stays. Returns its usage and
        what its row is to say of where its files are. It can be repeated.
        """

    @abstractmethod
    async def _discard(self, row: rows.SnapshotRow) -> None:
        """See that files whose row is gone go. What cannot be is left to ``cleanup``."""

    @abstractmethod
    async def close(self) -> None:
        """End what goes on behind the answers. The database is open still."""

    async def stat(self, namespace: str, key: str) -> SnapshotInfo:
        """See :class:`Snapshotter`."""
        return _info(self._db.look(lambda tx: rows.get(tx, self._space(namespace), key)))

    async def infos(self, namespace: str) -> list[SnapshotInfo]:
        """See :class:`Snapshotter`."""
        found = await self._db.read(lambda tx: rows.list_all(tx, self._space(namespace)))
        return [_info(row) for row in found]

    async def update(
        self, namespace: str, key: str, labels: Mapping[str, str], fields: Sequence[str] = ()
    ) -> SnapshotInfo:
        """See :class:`Snapshotter`."""

        def change(tx: sqlite3.Connection) -> SnapshotInfo:
            row = rows.get(tx, self._space(namespace), key)
            new = _changed_labels(row.labels, labels, fields)
            rows.set_labels(tx, row.id, new, now_ns=time.time_ns())
            return _info(rows.get(tx, self._space(namespace), key))

        info = await self._db.write(change)
        self._mutations.changed()
        return info

    async def usage(self, namespace: str, key: str) -> Usage:
        """See :class:`Snapshotter`."""
        row = await self._db.read(lambda tx: rows.get(tx, self._space(namespace), key))
        if row.kind == Kind.ACTIVE:
            return await self._measure(row)
        return Usage(row.inodes, row.size_bytes)

    async def mounts(self, namespace: str, key: str) -> list[Mount]:
        """See :class:`Snapshotter`."""

        def look(tx: sqlite3.Connection) -> tuple[rows.SnapshotRow, list[int]]:
            row = rows.get(tx, self._space(namespace), key)
            return row, rows.ancestors(tx, row.id)

        row, ancestors = self._db.look(look)
        if row.kind == Kind.COMMITTED:
            raise FailedPrecondition(
                f"snapshot {key!r} is committed and has no mounts: make a view on it"
            )
        return await self._mounts(row, ancestors)

    async def prepare(
        self, namespace: str, key: str, parent: str, labels: Mapping[str, str] | None = None
    ) -> list[Mount]:
        """See :class:`Snapshotter`."""
        return await uninterrupted(self._create(namespace, key, Kind.ACTIVE, parent, labels or {}))

    async def view(
        self, namespace: str, key: str, parent: str, labels: Mapping[str, str] | None = None
    ) -> list[Mount]:
        """See :class:`Snapshotter`."""
        return await uninterrupted(self._create(namespace, key, Kind.VIEW, parent, labels or {}))

    async def commit(
        self,
        namespace: str,
        name: str,
        key: str,
        labels: Mapping[str, str] | None = None,
        *,
        parent: str = "",
    ) -> None:
        """See :class:`Snapshotter`."""
        if not name:
            raise InvalidArgument("a committed snapshot needs a name", field="name")
        new_labels = checked_labels(labels or {})
        space = self._space(namespace)
        lease = self._leases.current()
        if await self._db.read(lambda tx: rows.exists(tx, space, name)):
            await self._refuse(namespace, name, lease)

        def look(tx: sqlite3.Connection) -> tuple[rows.SnapshotRow, rows.SnapshotRow | None]:
            row, _ = rows.require_committable(tx, space, key, name=name, parent=parent)
            moves = parent and parent != row.parent
            return row, rows.get_parent(tx, space, parent) if moves else None

        row, new_parent = await self._db.read(look)
        usage, backend = await uninterrupted(self._finish(row, new_parent, new_labels))
        self._trace("synced")

        def record(tx: sqlite3.Connection) -> None:
            rows.commit(
                tx,
                space,
                key,
                name=name,
                parent=parent,
                labels=new_labels,
                inodes=usage.inodes,
                size_bytes=usage.size_bytes,
                backend=backend,
                now_ns=time.time_ns(),
            )
            self._leases.detach(tx, namespace, self._type, key)
            self._leases.attach(tx, namespace, lease, self._type, name)
            fields = {"key": key, "name": name, "snapshotter": self.name}
            self._append(tx, namespace, "commit", fields)

        await self._db.write(record)
        self._trace("committed")
        self._mutations.changed()

    async def remove(self, namespace: str, key: str) -> None:
        """See :class:`Snapshotter`."""
        await uninterrupted(self._remove(namespace, key))

    async def _create(
        self, namespace: str, key: str, kind: Kind, parent: str, labels: Mapping[str, str]
    ) -> list[Mount]:
        if not key:
            raise InvalidArgument("a snapshot needs a key", field="key")
        kept_labels = checked_labels(labels)
        lease = self._leases.current()
        space = self._space(namespace)

        def look(tx: sqlite3.Connection) -> tuple[str, rows.SnapshotRow | None]:
            taken = [k for k in (labels.get(TARGET_LABEL, ""), key) if rows.exists(tx, space, k)]
            if taken:
                return taken[0], None
            return "", rows.get_parent(tx, space, parent) if parent else None

        taken, parent_row = self._db.look(look)
        if taken:
            await self._refuse(namespace, taken, lease)

        made = False  # the transaction may have to be run again

        def record(tx: sqlite3.Connection) -> tuple[rows.SnapshotRow, list[int]]:
            nonlocal made
            if not made:
                self._make_quickly(new)
                made = True
                self._trace("directory made")
            self._insert(tx, new, lease, backend)
            if kind == Kind.ACTIVE:
                fields = {"key": key, "parent": parent, "snapshotter": self.name}
                self._append(tx, namespace, "prepare", fields)
            return rows.get(tx, space, key), rows.ancestors(tx, new.id)

        new = NewSnapshot(self._ids.take(), namespace, key, kind, parent_row, kept_labels)
        self._being_made.add(new.id)
        try:
            backend = await self._make(new)
            row, ancestors = await self._db.write(record)
        except Exception:
            await self._unmake(new)
            raise
        finally:
            self._being_made.discard(new.id)
        self._trace("prepared")
        self._mutations.changed()
        return await self._mounts(row, ancestors)

    def _insert(self, tx: sqlite3.Connection, new: NewSnapshot, lease: str, backend: str) -> None:
        """Write the row of a new snapshot, and put it under a lease."""
        rows.insert(
            tx,
            self._space(new.namespace),
            new.key,
            snapshot_id=new.id,
            kind=new.kind,
            parent=new.parent.key if new.parent else "",
            labels=new.labels,
            backend=backend,
            now_ns=time.time_ns(),
        )
        self._leases.attach(tx, new.namespace, lease, self._type, new.key)

    async def _remove(self, namespace: str, key: str) -> None:
        def forget(tx: sqlite3.Connection) -> rows.SnapshotRow:
            row = rows.delete(tx, self._space(namespace), key)
            self._leases.detach(tx, namespace, self._type, key)
            self._append(tx, namespace, "remove", {"key": key, "snapshotter": self.name})
            return row

        row = await self._db.write(forget)
        self._trace("row deleted")
        self._mutations.deleted()
        await self._discard(row)

    async def _refuse(self, namespace: str, key: str, lease: str) -> None:
        """Say that ``key`` exists; whoever hears it relies on it, so it goes under their lease."""
        if lease:
            await self._db.write(
                lambda tx: self._leases.attach(tx, namespace, lease, self._type, key)
            )
        raise AlreadyExists(f"snapshot {key!r} already exists", resource=("snapshot", key))

    @property
    def _type(self) -> str:
        return f"snapshots/{self.name}"

    def _space(self, namespace: str) -> rows.Space:
        return rows.Space(self.name, namespace)

    def _append(
        self, tx: sqlite3.Connection, namespace: str, verb: str, fields: Mapping[str, object]
    ) -> None:
        type_name = f"containerd.events.Snapshot{verb.capitalize()}"
        self._events.append(tx, namespace, f"/snapshot/{verb}", type_name, fields)


def _info(row: rows.SnapshotRow) -> SnapshotInfo:
    return SnapshotInfo(
        row.key, Kind(row.kind), row.parent, row.labels, row.created_at_ns, row.updated_at_ns
    )


def _changed_labels(
    current: Mapping[str, str], labels: Mapping[str, str], fields: Sequence[str]
) -> dict[str, str]:
    result = dict(current if fields else labels)
    for path in fields:
        if path == "labels":
            result = dict(labels)
        elif path.startswith("labels."):
            label = path.removeprefix("labels.")
            result[label] = labels.get(label, "")
        else:
            raise InvalidArgument(
                f"field {path!r} of a snapshot cannot be changed: only labels can",
                field="update_mask",
            )
    return checked_labels(result)
