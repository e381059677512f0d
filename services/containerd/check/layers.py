"""The files of committed snapshots: compared with the layers that they were made of.

A layer is unpacked once more, into an active snapshot on the same parent, and the two trees are
walked side by side. What differs is damage; the new files take the place of the old ones then.
Crash in between: the old files are gone, or aside as ``rm-…``, and the next check does it again.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from dataclasses import replace
from typing import TYPE_CHECKING

from services.common.errors import NotFound
from services.common.frozen import frozen
from services.containerd.check.findings import Finding, Kind, Severity
from services.containerd.check.quick import name_of
from services.containerd.diff import changes
from services.containerd.metadata import snapshots as rows
from services.containerd.snapshots import tree
from services.containerd.snapshots.recorded import TARGET_LABEL
from services.containerd.snapshots.snapshotter import REBASE

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from services.common.database import Database
    from services.containerd.content.descriptor import Descriptor
    from services.containerd.diff.applier import Applier
    from services.containerd.snapshots.directories import DirectorySnapshotter
    from services.containerd.snapshots.snapshotter import Usage


_MISSING = "its files are missing"


@frozen
class LayerCheck:
    """Checks the snapshots of one snapshotter.

    Attributes:
        db: the open database.
        snapshotter: whose.
        applier: unpacks layers.
        layers: what snapshots are made of, by their names.
    """

    db: Database
    snapshotter: DirectorySnapshotter
    applier: Applier
    layers: Mapping[str, Descriptor]

    async def run(self, *, repair: bool) -> list[Finding]:
        """Check all committed snapshots, parents first, and repair them if asked."""
        name = self.snapshotter.name
        recorded = await self.db.read(lambda tx: rows.all_of(tx, name))
        found = []
        tainted: set[int] = set()  # hold copies of damaged files: they compare with nothing
        for row in recorded:
            if row.kind != rows.COMMITTED:
                continue
            copies = row.parent_id in tainted and REBASE not in self.snapshotter.capabilities
            finding = await self._check(row, None if copies else self.layers.get(row.key), repair)
            if copies or (finding is not None and not finding.repaired):
                tainted.add(row.id)
            if finding is not None:
                found.append(finding)
        return found

    async def _check(
        self,
        row: rows.SnapshotRow,
        layer: Descriptor | None,
        repair: bool,
    ) -> Finding | None:
        files = self.snapshotter.files(row.id)
        text = await self._counted(row) if files.is_dir() else _MISSING
        if layer is None or (text and not repair):
            return self._finding(row, text) if text else None
        key = f"check-{secrets.token_hex(6)} {row.key}"
        labels = {name: value for name, value in row.labels.items() if name != TARGET_LABEL}
        try:
            mounts = await self.snapshotter.prepare(row.namespace, key, row.parent, labels)
        except NotFound as error:  # its parent is not there, which is a finding of its own
            return self._finding(row, text, remedy=error.message) if text else None
        try:
            await self.applier.apply(row.namespace, layer, mounts)
            made = await self.db.read(lambda tx: rows.get(tx, self._space(row), key))
            if not text:
                text = await asyncio.to_thread(_difference, self.snapshotter.files(made.id), files)
            if not text or not repair:
                return self._finding(row, text) if text else None
            await self._replace(row, made)
        except NotFound as error:  # the namespace does not have the layer's blob
            return self._finding(row, text, remedy=error.message) if text else None
        finally:
            await self.snapshotter.remove(row.namespace, key)
        remedy = f"unpacked anew from {layer.digest}"
        return replace(self._finding(row, text, remedy=remedy), repaired=True)

    def _finding(self, row: rows.SnapshotRow, text: str, remedy: str = "") -> Finding:
        name = name_of(self.snapshotter.name, row)
        return Finding(Severity.DAMAGE, Kind.COMMITTED, name, text, remedy)

    def _space(self, row: rows.SnapshotRow) -> rows.Space:
        return rows.Space(self.snapshotter.name, row.namespace)

    async def _counted(self, row: rows.SnapshotRow) -> str:
        usage = await asyncio.to_thread(tree.measure, self.snapshotter.files(row.id))
        if usage.inodes == row.inodes:
            return ""
        return f"it has {usage.inodes} inodes, recorded are {row.inodes}"

    async def _replace(self, row: rows.SnapshotRow, fresh: rows.SnapshotRow) -> None:
        """Put the files of one snapshot in the place of another's, whose files are thrown away."""
        usage = await asyncio.to_thread(self._exchange, row.id, fresh.id)
        await self.db.write(
            lambda tx: rows.set_usage(tx, row.id, inodes=usage.inodes, size_bytes=usage.size_bytes)
        )

    def _exchange(self, damaged: int, made: int) -> Usage:
        root = self.snapshotter.root
        tree.sync(self.snapshotter.files(made))
        aside = tree.put_aside(root / str(damaged))
        (root / str(made)).rename(root / str(damaged))
        if aside is not None:
            aside.rename(root / str(made))
        fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        return tree.measure(self.snapshotter.files(damaged))


def _difference(made: Path, found: Path) -> str:
    """What the first difference between what a layer makes and what is there is; empty: none."""
    change = next(changes.between(made, found), None)
    if change is None:
        return ""
    verb = "is missing" if change.status is None else "is not as in its layer"
    return f"{change.name!r} {verb}"
