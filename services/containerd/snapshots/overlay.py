"""Snapshots on overlayfs: a directory for each, stacked by the kernel when they are mounted.

The record is a row; the files are ``<root>/snapshots/overlayfs/<id>`` (see :mod:`.tree`). How the
two keep step, and what a crash at any point leaves behind:

* **prepare** makes the directory, then the row. Crash between: a directory without a row, which
  ``cleanup`` removes. After a power failure the row may be there and the directory not, since it
  is not synced (nobody was promised the contents of an active snapshot): ``open`` makes it again.
* **commit** brings the file system to the disk, then changes the row. Crash between: the snapshot
  is still active. What a committed row names is on the disk.
* **remove** deletes the row, then renames the directory to ``rm-…`` and removes it. Crash between,
  or a failure: rubbish for ``cleanup``.

Ids are counted in memory, from beyond every row and directory that ``open`` finds, because the
directory must have its name before there is a row.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from services.common.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
)
from services.common.mounts import Mount
from services.containerd.content.labels import checked_labels
from services.containerd.metadata import snapshots as rows
from services.containerd.snapshots import tree
from services.containerd.snapshots.idmap import mapped_root
from services.containerd.snapshots.snapshotter import Kind, SnapshotInfo, Usage
from services.containerd.uninterrupted import uninterrupted

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Mapping, Sequence

    from services.common.database import Database
    from services.containerd.events.sink import EventSink
    from services.containerd.snapshots.collaborators import SnapshotLeases

log = structlog.get_logger(__name__)

NAME = "overlayfs"
TARGET_LABEL = "containerd.io/snapshot.ref"
"""On a prepare: the committed snapshot that it is meant to become; if that exists, so it says."""

_INDEX_PARAMETER = Path("/sys/module/overlay/parameters/index")
_INITIAL_USER_NAMESPACE = 0xEFFFFFFD  # linux/proc_ns.h, PROC_USER_INIT_INO


class OverlaySnapshotter:
    r"""The snapshotter ``overlayfs``. See :class:`Snapshotter` for the contract.

    Args:
        root: containerd's root, without ``:``, ``,`` or ``\`` in its path.
        db: the open database.
        events: where what happens to snapshots is told.
        leases: what keeps snapshots from the collector.
        trace: called with the name of each step that a crash may follow, for tests.
    """

    name = NAME

    def __init__(
        self,
        root: Path,
        db: Database,
        *,
        events: EventSink,
        leases: SnapshotLeases,
        trace: Callable[[str], None] = lambda _: None,
    ) -> None:
        if set(str(root)) & set(":,\\"):
            raise InvalidArgument(f"root {root} must have none of : , \\ in its path", field="root")
        self.root = root / "snapshots" / NAME
        self._db = db
        self._events = events
        self._leases = leases
        self._trace = trace
        self._ids = itertools.count(1)
        self._being_made: set[int] = set()
        self._options = _mount_options()

    async def open(self) -> None:
        """Bring directories and rows into step after a start. Call it once, before anything else.

        Directories without a row stay until ``cleanup``.
        """
        await asyncio.to_thread(self.root.mkdir, mode=0o700, parents=True, exist_ok=True)
        recorded = await self._db.read(lambda tx: rows.kinds(tx, NAME))
        highest = await self._db.read(rows.highest_id)
        present = {int(n) for n in await asyncio.to_thread(os.listdir, self.root) if n.isdigit()}
        self._ids = itertools.count(max(highest, *present, 0) + 1)
        for snapshot_id in sorted(recorded.keys() - present):
            await self._remake(snapshot_id, recorded[snapshot_id])

    async def stat(self, namespace: str, key: str) -> SnapshotInfo:
        """See :class:`Snapshotter`."""
        return _info(await self._db.read(lambda tx: rows.get(tx, _space(namespace), key)))

    async def infos(self, namespace: str) -> list[SnapshotInfo]:
        """See :class:`Snapshotter`."""
        found = await self._db.read(lambda tx: rows.list_all(tx, _space(namespace)))
        return [_info(row) for row in found]

    async def update(
        self, namespace: str, key: str, labels: Mapping[str, str], fields: Sequence[str] = ()
    ) -> SnapshotInfo:
        """See :class:`Snapshotter`."""

        def change(tx: sqlite3.Connection) -> SnapshotInfo:
            row = rows.get(tx, _space(namespace), key)
            new = _changed_labels(row.labels, labels, fields)
            rows.set_labels(tx, row.id, new, now_ns=time.time_ns())
            return _info(rows.get(tx, _space(namespace), key))

        return await self._db.write(change)

    async def usage(self, namespace: str, key: str) -> Usage:
        """See :class:`Snapshotter`."""
        row = await self._db.read(lambda tx: rows.get(tx, _space(namespace), key))
        if row.kind == Kind.ACTIVE:
            return await asyncio.to_thread(tree.measure, self._files(row.id))
        return Usage(row.inodes, row.size_bytes)

    async def mounts(self, namespace: str, key: str) -> list[Mount]:
        """See :class:`Snapshotter`."""

        def look(tx: sqlite3.Connection) -> tuple[rows.SnapshotRow, list[int]]:
            row = rows.get(tx, _space(namespace), key)
            return row, rows.ancestors(tx, row.id)

        row, ancestors = await self._db.read(look)
        if row.kind == Kind.COMMITTED:
            raise FailedPrecondition(
                f"snapshot {key!r} is committed and has no mounts: make a view on it"
            )
        return self._mounts(row.id, Kind(row.kind), ancestors)

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
        space = _space(namespace)
        lease = self._leases.current()
        if await self._db.read(lambda tx: rows.exists(tx, space, name)):
            await self._refuse(namespace, name, lease)
        row, _ = await self._db.read(
            lambda tx: rows.require_committable(tx, space, key, name=name, parent=parent)
        )
        await asyncio.to_thread(tree.sync, self._files(row.id))
        usage = await asyncio.to_thread(tree.measure, self._files(row.id))
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
                now_ns=time.time_ns(),
            )
            self._leases.detach(tx, namespace, f"snapshots/{NAME}", key)
            self._leases.attach(tx, namespace, lease, f"snapshots/{NAME}", name)
            fields = {"key": key, "name": name, "snapshotter": NAME}
            self._append(tx, namespace, "commit", fields)

        await self._db.write(record)

    async def remove(self, namespace: str, key: str) -> None:
        """See :class:`Snapshotter`."""
        await uninterrupted(self._remove(namespace, key))

    async def cleanup(self) -> None:
        """See :class:`Snapshotter`."""
        names = await asyncio.to_thread(os.listdir, self.root)
        # In this order: what was being made while we looked has a row by now, or is still here.
        being_made = set(self._being_made)
        known = await self._db.read(lambda tx: rows.kinds(tx, NAME)) | dict.fromkeys(being_made, 0)
        for name in names:
            if not (name.isdigit() and int(name) in known):
                await uninterrupted(asyncio.to_thread(self._discard, self.root / name))

    async def _create(
        self, namespace: str, key: str, kind: Kind, parent: str, labels: Mapping[str, str]
    ) -> list[Mount]:
        if not key:
            raise InvalidArgument("a snapshot needs a key", field="key")
        kept_labels = checked_labels(labels)
        lease = self._leases.current()
        space = _space(namespace)

        def look(tx: sqlite3.Connection) -> tuple[str, int | None]:
            taken = [k for k in (labels.get(TARGET_LABEL, ""), key) if rows.exists(tx, space, k)]
            if taken:
                return taken[0], None
            return "", rows.get_parent(tx, space, parent).id if parent else None

        taken, parent_id = await self._db.read(look)
        if taken:
            await self._refuse(namespace, taken, lease)

        def record(tx: sqlite3.Connection) -> list[int]:
            rows.insert(
                tx,
                space,
                key,
                snapshot_id=snapshot_id,
                kind=kind,
                parent=parent,
                labels=kept_labels,
                now_ns=time.time_ns(),
            )
            self._leases.attach(tx, namespace, lease, f"snapshots/{NAME}", key)
            if kind == Kind.ACTIVE:
                fields = {"key": key, "parent": parent, "snapshotter": NAME}
                self._append(tx, namespace, "prepare", fields)
            return rows.ancestors(tx, snapshot_id)

        snapshot_id = next(self._ids)
        self._being_made.add(snapshot_id)
        try:
            await asyncio.to_thread(self._make, snapshot_id, kind, parent_id, labels)
            self._trace("directory made")
            ancestors = await self._db.write(record)
        except Exception:
            await asyncio.to_thread(self._discard, self.root / str(snapshot_id))
            raise
        finally:
            self._being_made.discard(snapshot_id)
        return self._mounts(snapshot_id, kind, ancestors)

    async def _remove(self, namespace: str, key: str) -> None:
        def forget(tx: sqlite3.Connection) -> int:
            snapshot_id = rows.delete(tx, _space(namespace), key)
            self._leases.detach(tx, namespace, f"snapshots/{NAME}", key)
            self._append(tx, namespace, "remove", {"key": key, "snapshotter": NAME})
            return snapshot_id

        snapshot_id = await self._db.write(forget)
        self._trace("row deleted")
        await asyncio.to_thread(self._discard, self.root / str(snapshot_id))

    async def _refuse(self, namespace: str, key: str, lease: str) -> None:
        """Say that ``key`` exists; whoever hears it relies on it, so it goes under their lease."""
        if lease:
            await self._db.write(
                lambda tx: self._leases.attach(tx, namespace, lease, f"snapshots/{NAME}", key)
            )
        raise AlreadyExists(f"snapshot {key!r} already exists", resource=("snapshot", key))

    async def _remake(self, snapshot_id: int, kind: int) -> None:
        if kind == Kind.COMMITTED:
            log.error("files of a committed snapshot are missing", id=snapshot_id)
            return
        ancestors = await self._db.read(lambda tx: rows.ancestors(tx, snapshot_id))
        parent_id = ancestors[0] if ancestors else None
        await asyncio.to_thread(self._make, snapshot_id, Kind(kind), parent_id, {})
        log.warning("files of an active snapshot were lost, it is empty now", id=snapshot_id)

    def _make(
        self, snapshot_id: int, kind: Kind, parent_id: int | None, labels: Mapping[str, str]
    ) -> None:
        parent = None if parent_id is None else self._files(parent_id)
        owner = mapped_root(labels)
        try:
            tree.make(
                self.root / str(snapshot_id), like=parent, owner=owner, work=kind == Kind.ACTIVE
            )
        except FileNotFoundError as error:
            raise NotFound("the parent snapshot was removed meanwhile") from error
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise ResourceExhausted("no room for a snapshot: make some and try again") from error

    def _discard(self, directory: Path) -> None:
        """Remove what no row names; a failure is logged, and ``cleanup`` tries again."""
        try:
            aside = directory if directory.name.startswith("rm-") else tree.put_aside(directory)
            self._trace("put aside")
            if aside is not None:
                tree.remove(aside)
        except OSError as error:
            log.warning("snapshot files not removed", path=str(directory), reason=str(error))

    def _mounts(self, snapshot_id: int, kind: Kind, ancestors: list[int]) -> list[Mount]:
        if not ancestors:
            mode = "ro" if kind == Kind.VIEW else "rw"
            return [Mount("bind", str(self._files(snapshot_id)), options=(mode, "rbind"))]
        if kind == Kind.VIEW and len(ancestors) == 1:
            return [Mount("bind", str(self._files(ancestors[0])), options=("ro", "rbind"))]
        options = []
        if kind == Kind.ACTIVE:
            options.append(f"workdir={self.root / str(snapshot_id) / 'work'}")
            options.append(f"upperdir={self._files(snapshot_id)}")
        options.append("lowerdir=" + ":".join(str(self._files(i)) for i in ancestors))
        return [Mount("overlay", "overlay", options=(*options, *self._options))]

    def _files(self, snapshot_id: int) -> Path:
        return self.root / str(snapshot_id) / "fs"

    def _append(
        self, tx: sqlite3.Connection, namespace: str, verb: str, fields: Mapping[str, object]
    ) -> None:
        type_name = f"containerd.events.Snapshot{verb.capitalize()}"
        self._events.append(tx, namespace, f"/snapshot/{verb}", type_name, fields)


def _space(namespace: str) -> rows.Space:
    return rows.Space(NAME, namespace)


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


def _mount_options() -> tuple[str, ...]:
    """What every overlay needs besides its directories on this machine.

    ``index=off``, because lower directories are shared between mounts. Inside a user namespace
    only ``user.`` attributes can be written, hence ``userxattr``.
    """
    namespace = Path("/proc/self/ns/user").stat().st_ino
    options = [] if namespace == _INITIAL_USER_NAMESPACE else ["userxattr"]
    if _INDEX_PARAMETER.exists():
        options.append("index=off")
    return tuple(options)
