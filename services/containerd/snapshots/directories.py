"""Snapshotters that keep each snapshot in a directory of this machine.

The files are ``<root>/snapshots/<snapshotter>/<id>`` (see :mod:`.tree`). What :mod:`.recorded` says
of a crash means here:

* a directory without a row is what ``cleanup`` removes;
* after a power failure the row of an active snapshot may be there and its directory not, since it
  is not synced (nobody was promised the contents): ``open`` makes it again. What a committed row
  names is on the disk;
* a removed directory is first renamed to ``rm-…``, so that nobody takes it for a snapshot;
* directories are removed behind the answer (see :mod:`.discards`), which ``cleanup`` waits for.
"""

from __future__ import annotations

import asyncio
import errno
import os
from abc import abstractmethod
from typing import TYPE_CHECKING

import structlog

from services.common.errors import InvalidArgument, NotFound, ResourceExhausted
from services.containerd.gc.mutations import UNHEARD
from services.containerd.metadata import snapshots as rows
from services.containerd.snapshots import tree
from services.containerd.snapshots.discards import Discards
from services.containerd.snapshots.idmap import id_map
from services.containerd.snapshots.recorded import NewSnapshot, RecordedSnapshotter, SnapshotIds
from services.containerd.snapshots.snapshotter import Kind, Usage
from services.containerd.uninterrupted import uninterrupted

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from services.common.database import Database
    from services.common.mounts import Mount
    from services.containerd.events.sink import EventSink
    from services.containerd.gc.mutations import Mutations
    from services.containerd.snapshots.collaborators import SnapshotLeases

log = structlog.get_logger(__name__)


class DirectorySnapshotter(RecordedSnapshotter):
    r"""Keeps snapshots below ``root``; a subclass says how they are mounted.

    Args:
        root: containerd's root, without ``:``, ``,`` or ``\`` in its path.
        db: the open database.
        events: where what happens to snapshots is told.
        leases: what keeps snapshots from the collector.
        ids: shared by all snapshotters of the database; None: there is but this one.
        mutations: told of every change.
        trace: called with the name of each step that a crash may follow, for tests.
    """

    _copies = False
    """``_fill`` takes its time: snapshots are made in a thread of their own."""

    def __init__(
        self,
        root: Path,
        db: Database,
        *,
        events: EventSink,
        leases: SnapshotLeases,
        ids: SnapshotIds | None = None,
        mutations: Mutations = UNHEARD,
        trace: Callable[[str], None] = lambda _: None,
    ) -> None:
        if set(str(root)) & set(":,\\"):
            raise InvalidArgument(f"root {root} must have none of : , \\ in its path", field="root")
        super().__init__(
            db, events=events, leases=leases, ids=ids, mutations=mutations, trace=trace
        )
        self.root = root / "snapshots" / self.name
        self._discards = Discards(self._throw_away)

    async def open(self) -> None:
        """Bring directories and rows into step after a start. Call it once, before anything else.

        Directories without a row stay until ``cleanup``.
        """
        present = await self.begin()
        recorded = await self._db.read(lambda tx: rows.kinds(tx, self.name))
        for snapshot_id in sorted(recorded.keys() - present):
            await self._remake(snapshot_id, recorded[snapshot_id])

    async def begin(self) -> set[int]:
        """Make new snapshots possible, and change nothing of others; returns whose files exist."""
        await asyncio.to_thread(self.root.mkdir, mode=0o700, parents=True, exist_ok=True)
        highest = await self._db.read(rows.highest_id)
        present = {int(n) for n in await asyncio.to_thread(os.listdir, self.root) if n.isdigit()}
        self._ids.pass_by([highest, *present])
        return present

    async def cleanup(self) -> None:
        """See :class:`Snapshotter`."""
        await self._discards.finish()
        names = await asyncio.to_thread(os.listdir, self.root)
        # In this order: what was being made while we looked has a row by now, or is still here.
        being_made = set(self._being_made)
        known = await self._db.read(lambda tx: rows.kinds(tx, self.name))
        known |= dict.fromkeys(being_made, 0)
        for name in names:
            if not (name.isdigit() and int(name) in known):
                await uninterrupted(asyncio.to_thread(self._throw_away, self.root / name))

    async def close(self) -> None:
        """See :class:`RecordedSnapshotter`."""
        await self._discards.close()

    def files(self, snapshot_id: int) -> Path:
        """Where the files of a snapshot are."""
        return self.root / str(snapshot_id) / "fs"

    @abstractmethod
    def _fill(self, directory: Path, kind: Kind, parent: Path | None) -> None:
        """Put into a new snapshot's files what it needs of its parent's. Blocks."""

    async def _make(self, new: NewSnapshot) -> str:
        if self._copies:
            await asyncio.to_thread(self._make_files, new)
        return ""

    def _make_quickly(self, new: NewSnapshot) -> None:
        if not self._copies:
            self._make_files(new)

    def _make_files(self, new: NewSnapshot) -> None:
        parent = None if new.parent is None else self.files(new.parent.id)
        self._make_directory(new.id, new.kind, parent, new.labels)

    async def _unmake(self, new: NewSnapshot) -> None:
        await asyncio.to_thread(self._throw_away, self.root / str(new.id))

    async def _measure(self, row: rows.SnapshotRow) -> Usage:
        return await asyncio.to_thread(tree.measure, self.files(row.id))

    async def _finish(
        self, row: rows.SnapshotRow, _parent: rows.SnapshotRow | None, _labels: Mapping[str, str]
    ) -> tuple[Usage, str]:
        # At once: stat(2) counts what the file system has not given a place yet, too.
        _, usage = await asyncio.gather(
            asyncio.to_thread(tree.sync, self.files(row.id)), self._measure(row)
        )
        return usage, ""

    async def _discard(self, row: rows.SnapshotRow) -> None:
        await self._discards.add(self.root / str(row.id))

    async def _remake(self, snapshot_id: int, kind: int) -> None:
        if kind == Kind.COMMITTED:
            log.error(
                "files of a committed snapshot are missing",
                id=snapshot_id,
                snapshotter=self.name,
                remedy="stop the service and run theseus-containerd check --repair",
            )
            return
        row, ancestors = await self._db.read(
            lambda tx: (rows.get_by_id(tx, snapshot_id), rows.ancestors(tx, snapshot_id))
        )
        parent = self.files(ancestors[0]) if ancestors else None
        try:
            await asyncio.to_thread(
                self._make_directory, snapshot_id, Kind(kind), parent, row.labels
            )
        except NotFound:
            log.error("files of a snapshot are missing, and its parent's too", id=snapshot_id)
        else:
            log.warning("files of an active snapshot were lost, it is empty now", id=snapshot_id)

    def _make_directory(
        self, snapshot_id: int, kind: Kind, parent: Path | None, labels: Mapping[str, str]
    ) -> None:
        ids = id_map(labels)
        directory = self.root / str(snapshot_id)
        try:
            tree.make(
                directory,
                like=parent,
                owner=ids.root if ids else None,
                work=kind == Kind.ACTIVE,
            )
            self._fill(directory, kind, parent)
        except FileNotFoundError as error:
            raise NotFound("the parent snapshot was removed meanwhile") from error
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise ResourceExhausted("no room for a snapshot: make some and try again") from error

    def _throw_away(self, directory: Path) -> None:
        """Remove what no row names; a failure is logged, and ``cleanup`` tries again."""
        try:
            aside = directory if directory.name.startswith("rm-") else tree.put_aside(directory)
            self._trace("put aside")
            if aside is not None:
                tree.remove(aside)
        except OSError as error:
            log.warning("snapshot files not removed", path=str(directory), reason=str(error))

    @abstractmethod
    async def _mounts(self, row: rows.SnapshotRow, ancestors: Sequence[int]) -> list[Mount]: ...
