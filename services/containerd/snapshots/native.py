"""Snapshots as whole trees: each has all the files of its parent, copied, and its own.

For file systems that overlayfs cannot stand on. Where the file system can share blocks between
files (btrfs, xfs), a copy takes no room until it is written to.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.common.errors import Unimplemented
from services.common.mounts import Mount
from services.containerd.snapshots.copy import copy_tree
from services.containerd.snapshots.directories import DirectorySnapshotter
from services.containerd.snapshots.snapshotter import Kind, Usage

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from services.containerd.metadata.snapshots import SnapshotRow


class NativeSnapshotter(DirectorySnapshotter):
    """The snapshotter ``native``. Usage counts the whole tree, as upstream's does."""

    name = "native"
    _copies = True

    def _fill(self, directory: Path, kind: Kind, parent: Path | None) -> None:
        if kind == Kind.ACTIVE and parent is not None:
            copy_tree(parent, directory / "fs")

    async def _finish(
        self, row: SnapshotRow, parent: SnapshotRow | None, labels: Mapping[str, str]
    ) -> tuple[Usage, str]:
        if parent is not None:
            raise Unimplemented(
                f"snapshotter {self.name!r} cannot put snapshot {row.key!r} on {parent.key!r}: it "
                "has none of that one's files; prepare it on its parent"
            )
        return await super()._finish(row, parent, labels)

    async def _mounts(self, row: SnapshotRow, ancestors: Sequence[int]) -> list[Mount]:
        mode = "ro" if row.kind == Kind.VIEW else "rw"
        shown = ancestors[0] if ancestors and row.kind == Kind.VIEW else row.id
        return [Mount("bind", str(self.files(shown)), options=(mode, "rbind"))]
