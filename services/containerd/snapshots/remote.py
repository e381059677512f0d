"""Snapshots that another service keeps: containerd's proxy snapshotters.

Names, labels, parents, leases and garbage are ours, as with every snapshotter; the files, and how
they are mounted, are the service's. There a snapshot is called ``<namespace>/<id>/<key>``, and when
it is committed ``<namespace>/<id>/<key> committed``: names that never come again, whatever clients
call theirs. What a crash leaves:

* **prepare** notes the name as a leftover, has the service make it, then writes the row and strikes
  the name out. Crash between: a leftover, which ``cleanup`` has the service remove.
* **commit** has the service commit, then changes the row. Crash between: the row is active and the
  service's snapshot is committed; the next commit finds that, and so does a removal.
* **remove**, and a collection, delete the row, which makes its name a leftover (by a trigger), then
  tell the service. A service that cannot be reached is told by a later ``cleanup``.

A service may know a snapshot before anybody unpacked it (stargz, nydus): asked to prepare what is
to become ``containerd.io/snapshot.ref``, it says that this exists. It is recorded, committed, then.
"""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

import structlog

from services.common.errors import (
    AlreadyExists,
    FailedPrecondition,
    NotFound,
    TheseusError,
    Unimplemented,
)
from services.containerd.gc.mutations import UNHEARD
from services.containerd.metadata import leftovers, meta
from services.containerd.metadata import snapshots as rows
from services.containerd.snapshots.recorded import (
    TARGET_LABEL,
    NewSnapshot,
    RecordedSnapshotter,
    SnapshotIds,
)
from services.containerd.snapshots.snapshotter import (
    INHERITED_LABEL_PREFIX,
    REBASE,
    Kind,
    SnapshotInfo,
    Usage,
)

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Mapping, Sequence

    from services.common.database import Database
    from services.common.mounts import Mount
    from services.containerd.events.sink import EventSink
    from services.containerd.gc.mutations import Mutations
    from services.containerd.snapshots.collaborators import SnapshotLeases
    from services.containerd.snapshots.snapshotter import Snapshotter

log = structlog.get_logger(__name__)

_COMMITTED = " committed"


class RemoteSnapshotter(RecordedSnapshotter):
    """A snapshotter whose files ``backend`` keeps.

    Args:
        backend: the service.
        db: the open database.
        events: where what happens to snapshots is told.
        leases: what keeps snapshots from the collector.
        capabilities: what the service can do that not every one can.
        ids: shared by all snapshotters of the database; None: there is but this one.
        mutations: told of every change.
        trace: called with the name of each step that a crash may follow, for tests.
    """

    def __init__(
        self,
        backend: Snapshotter,
        db: Database,
        *,
        events: EventSink,
        leases: SnapshotLeases,
        capabilities: Sequence[str] = (),
        ids: SnapshotIds | None = None,
        mutations: Mutations = UNHEARD,
        trace: Callable[[str], None] = lambda _: None,
    ) -> None:
        super().__init__(
            db, events=events, leases=leases, ids=ids, mutations=mutations, trace=trace
        )
        self.name = backend.name
        self.capabilities = tuple(capabilities)
        self._backend = backend
        self._root = ""

    async def open(self) -> None:
        """See :class:`RecordedSnapshotter`. The service need not be there yet."""
        identity = await self._db.write(lambda tx: meta.setdefault(tx, "uuid", str(uuid.uuid4())))
        self._root = identity[:8]
        highest = await self._db.read(rows.highest_id)
        left = await self._db.read(lambda tx: leftovers.list_all(tx, self.name))
        self._ids.pass_by([highest, *(_id(backend) for _, backend in left)])

    async def update(
        self, namespace: str, key: str, labels: Mapping[str, str], fields: Sequence[str] = ()
    ) -> SnapshotInfo:
        """See :class:`Snapshotter`. Labels that are for snapshotters are passed on."""
        info = await super().update(namespace, key, labels, fields)
        row = await self._db.read(lambda tx: rows.get(tx, self._space(namespace), key))
        passed_on = _inherited(info.labels)
        if passed_on:
            paths = [f"labels.{name}" for name in passed_on]
            await self._backend.update(namespace, row.backend, passed_on, paths)
        return info

    async def cleanup(self) -> None:
        """See :class:`Snapshotter`."""
        being_made = set(self._being_made)
        found = await self._db.read(lambda tx: leftovers.list_all(tx, self.name))
        for namespace, backend in found:
            if _id(backend) not in being_made:
                await self._remove_there(namespace, backend)
        try:
            await self._backend.cleanup()
        except Unimplemented:
            log.debug("service has no cleanup", snapshotter=self.name)

    async def close(self) -> None:
        """See :class:`RecordedSnapshotter`: nothing goes on here."""

    def _make_quickly(self, new: NewSnapshot) -> None:
        """There is nothing here to make: the service has the files."""

    async def _make(self, new: NewSnapshot) -> str:
        backend = self._name_there(new)
        parent = new.parent.backend if new.parent else ""
        await self._db.write(lambda tx: leftovers.add(tx, self.name, new.namespace, backend))
        make = self._backend.view if new.kind == Kind.VIEW else self._backend.prepare
        try:
            await make(new.namespace, backend, parent, _inherited(new.labels))
        except AlreadyExists:
            # Of that name there is only what we made, by a call whose answer was lost.
            if target := new.labels.get(TARGET_LABEL, ""):
                await self._adopt(new, target, parent)
                raise AlreadyExists(
                    f"snapshot {target!r} already exists", resource=("snapshot", target)
                ) from None
        return backend

    async def _unmake(self, new: NewSnapshot) -> None:
        try:
            await self._remove_there(new.namespace, self._name_there(new))
        except TheseusError as error:
            self._postponed(self._name_there(new), error)

    def _insert(self, tx: sqlite3.Connection, new: NewSnapshot, lease: str, backend: str) -> None:
        super()._insert(tx, new, lease, backend)
        leftovers.forget(tx, self.name, new.namespace, backend)

    async def _mounts(self, row: rows.SnapshotRow, _ancestors: Sequence[int]) -> list[Mount]:
        return await self._backend.mounts(row.namespace, row.backend)

    async def _measure(self, row: rows.SnapshotRow) -> Usage:
        return await self._backend.usage(row.namespace, row.backend)

    async def _finish(
        self, row: rows.SnapshotRow, parent: rows.SnapshotRow | None, labels: Mapping[str, str]
    ) -> tuple[Usage, str]:
        if parent is not None and REBASE not in self.capabilities:
            raise Unimplemented(
                f"snapshotter {self.name!r} cannot put snapshot {row.key!r} on {parent.key!r}: "
                "prepare it on its parent"
            )
        name = row.backend + _COMMITTED
        new_parent = parent.backend if parent else ""
        try:
            await self._backend.commit(
                row.namespace, name, row.backend, _inherited(labels), parent=new_parent
            )
        except (NotFound, AlreadyExists):
            # A commit before this one got as far as the service.
            if (await self._backend.stat(row.namespace, name)).kind != Kind.COMMITTED:
                raise
        return await self._backend.usage(row.namespace, name), name

    async def _discard(self, row: rows.SnapshotRow) -> None:
        try:
            await self._remove_there(row.namespace, row.backend)
        except TheseusError as error:
            self._postponed(row.backend, error)

    async def _adopt(self, new: NewSnapshot, target: str, parent: str) -> None:
        """Record as committed what the service says that it has.

        Raises:
            NotFound: it does not have it, or on another parent.
        """
        found = await self._backend.infos(new.namespace)
        known = next(
            (
                info
                for info in found
                if info.kind == Kind.COMMITTED
                and info.labels.get(TARGET_LABEL) == target
                and info.parent == parent
            ),
            None,
        )
        if known is None:
            raise NotFound(
                f"snapshotter {self.name!r} says that {target!r} exists, and has none of that name "
                f"on {parent or 'nothing'!r}",
                resource=("snapshot", target),
            )
        usage = await self._backend.usage(new.namespace, known.name)
        lease = self._leases.current()
        space = self._space(new.namespace)

        def record(tx: sqlite3.Connection) -> None:
            if not rows.exists(tx, space, target):
                labels = {**known.labels, **new.labels}
                adopted = NewSnapshot(
                    new.id, new.namespace, target, Kind.COMMITTED, new.parent, labels
                )
                self._insert(tx, adopted, lease, known.name)
                rows.set_usage(tx, new.id, inodes=usage.inodes, size_bytes=usage.size_bytes)
            else:
                self._leases.attach(tx, new.namespace, lease, self._type, target)

        await self._db.write(record)

    async def _remove_there(self, namespace: str, backend: str) -> None:
        """Have the service remove a snapshot, if it has it, and strike it out.

        One that others still stand on there stays noted: they go first.
        """
        for name in dict.fromkeys((backend, backend.removesuffix(_COMMITTED) + _COMMITTED)):
            try:
                await self._backend.remove(namespace, name)
            except NotFound:
                continue
            except FailedPrecondition as error:
                self._postponed(name, error)
                return
        await self._db.write(lambda tx: leftovers.forget(tx, self.name, namespace, backend))

    def _name_there(self, new: NewSnapshot) -> str:
        return f"{new.namespace}/{new.id}-{self._root}/{new.key}"

    def _postponed(self, backend: str, error: TheseusError) -> None:
        log.warning(
            "removal is left for later",
            snapshotter=self.name,
            backend=backend,
            reason=error.message,
        )


def _id(backend: str) -> int:
    """The id in a name that is ours; 0 in one of the service's own."""
    _, _, rest = backend.partition("/")
    number = rest.partition("-")[0]
    return int(number) if number.isascii() and number.isdigit() else 0


def _inherited(labels: Mapping[str, str]) -> dict[str, str]:
    """What snapshotters are told of a snapshot's labels."""
    return {
        name: value
        for name, value in labels.items()
        if name == TARGET_LABEL or name.startswith(INHERITED_LABEL_PREFIX)
    }
