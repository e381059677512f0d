"""The whole check of a root that nobody uses: database, blobs, snapshots; and their repair.

In this order, because each needs the one before: a blob is fetched again to be unpacked again.
Repair never makes things worse: what is damaged is replaced once what takes its place is complete,
and only the record of a blob that nobody can give back is dropped, so that a pull brings it again.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING

from services.common.errors import TheseusError
from services.containerd.check import quick
from services.containerd.check.blobs import BlobRepair, blob_path, find_corrupt, sources
from services.containerd.check.findings import Finding, Kind, Severity
from services.containerd.check.images import ImageMap, read_images
from services.containerd.check.layers import LayerCheck
from services.containerd.content.descriptor import Descriptor
from services.containerd.content.files import unlink
from services.containerd.metadata import content, images

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Collection, Sequence
    from pathlib import Path

    from services.common.database import Database
    from services.containerd.content.local import LocalContentStore
    from services.containerd.diff.applier import Applier
    from services.containerd.remotes.remote import Registries
    from services.containerd.snapshots.directories import DirectorySnapshotter

_DATABASE_MESSAGES = 20


class Checker:
    """Checks a root. Nothing else may use it meanwhile.

    Args:
        root: containerd's root.
        db: the open database.
        store: the content store.
        snapshotters: those that keep directories.
        applier: unpacks layers.
        registries: where blobs are fetched from again.
    """

    def __init__(
        self,
        root: Path,
        db: Database,
        *,
        store: LocalContentStore,
        snapshotters: Sequence[DirectorySnapshotter],
        applier: Applier,
        registries: Registries,
    ) -> None:
        self._root = root
        self._db = db
        self._store = store
        self._snapshotters = snapshotters
        self._applier = applier
        self._registries = registries

    async def quick(self) -> list[Finding]:
        """Compare names and sizes, and look the database through."""
        names = tuple(snapshotter.name for snapshotter in self._snapshotters)
        found = await self._db.read(_check_database)
        return found + await quick.look(self._db, self._root, names)

    async def full(self, *, repair: bool) -> list[Finding]:
        """Read all blobs, too, and compare snapshots with their layers; put right what can be."""
        found = await self.quick()
        blobs = [f for f in found if (f.severity, f.kind) == (Severity.DAMAGE, Kind.BLOB)]
        # A snapshot is looked at once more, with its layer.
        found = [f for f in found if f not in blobs and f.kind != Kind.COMMITTED]
        blobs += await self._hash({finding.name for finding in blobs})
        if repair and blobs:
            blobs = await self._repair_blobs(blobs)
        bad = {finding.name for finding in blobs if not finding.repaired}
        layers = {
            name: layer
            for name, layer in (await self._read_images(bad)).layers.items()
            if layer.digest not in bad
        }
        snapshots = []
        for snapshotter in self._snapshotters:
            await snapshotter.begin()
            try:
                check = LayerCheck(self._db, snapshotter, self._applier, layers)
                snapshots += await check.run(repair=repair)
            finally:
                await snapshotter.close()
        if repair:
            found = await self._tidy(found)
        return [*blobs, *snapshots, *found]

    async def _hash(self, known_bad: Collection[str]) -> list[Finding]:
        sizes = await self._db.read(content.all_sizes)
        corrupt = await find_corrupt(self._root, sorted(sizes.keys() - set(known_bad)))
        return [
            Finding(Severity.DAMAGE, Kind.BLOB, digest, f"its bytes have the digest {actual}")
            for digest, actual in sorted(corrupt.items())
        ]

    async def _read_images(self, bad: Collection[str]) -> ImageMap:
        targets = await self._db.read(_targets)
        return await asyncio.to_thread(read_images, self._root, targets, bad)

    async def _repair_blobs(self, damaged: list[Finding]) -> list[Finding]:
        """Fetch blobs anew. An index that is there again names the manifests to be fetched next."""
        labelled = await self._db.read(content.all_labels)
        sizes = await self._db.read(content.all_sizes)
        repair = BlobRepair(self._root, self._registries, sources(labelled))
        waiting = {finding.name: finding for finding in damaged}
        done: list[Finding] = []
        while waiting:
            image_map = await self._read_images(waiting)
            known = [digest for digest in waiting if digest in image_map.blobs]
            for digest in known or list(waiting):
                finding = waiting.pop(digest)
                described = image_map.blobs.get(digest, Descriptor("", digest, 0))
                described = replace(described, size_bytes=sizes[digest])
                done.append(await self._repair_blob(repair, finding, described))
        return done

    async def _repair_blob(
        self, repair: BlobRepair, finding: Finding, descriptor: Descriptor
    ) -> Finding:
        try:
            source = await repair.fetch(descriptor)
        except TheseusError as error:
            # What cannot be given back is better missing than wrong: a pull brings it again.
            await self._db.write(lambda tx: content.forget_lost_blob(tx, descriptor.digest))
            await asyncio.to_thread(unlink, blob_path(self._root, descriptor.digest))
            return replace(finding, remedy=f"dropped, pull it again: {error.message}")
        return replace(finding, remedy=f"fetched again from {source}", repaired=True)

    async def _tidy(self, others: list[Finding]) -> list[Finding]:
        """Do what a start does about leftovers, and about active snapshots that were lost."""
        await self._store.reconcile()
        for snapshotter in self._snapshotters:
            await snapshotter.open()
            await snapshotter.cleanup()
        tidied = []
        for finding in others:
            if finding.severity == Severity.LEFTOVER:
                tidied.append(replace(finding, remedy="removed", repaired=True))
            elif finding.kind == Kind.ACTIVE:
                tidied.append(replace(finding, remedy="made anew, empty", repaired=True))
            else:
                tidied.append(finding)
        return tidied


def _check_database(tx: sqlite3.Connection) -> list[Finding]:
    messages = [str(row[0]) for row in tx.execute(f"PRAGMA integrity_check({_DATABASE_MESSAGES})")]
    messages += [
        f"a row of {row[0]} refers to one of {row[2]} that is not there"
        for row in tx.execute("PRAGMA foreign_key_check")
    ]
    return [
        Finding(Severity.DAMAGE, Kind.DATABASE, "meta.db", message)
        for message in messages
        if message != "ok"
    ]


def _targets(tx: sqlite3.Connection) -> list[Descriptor]:
    return [
        Descriptor(row["media_type"], row["digest"], row["size_bytes"])
        for row in images.all_targets(tx)
    ]
