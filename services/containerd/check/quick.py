"""Rows against files, by names and sizes: quick enough for a start after a crash.

No file is opened. Everything here blocks, but for ``look``.
"""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

from services.common.frozen import frozen
from services.containerd.check.findings import Finding, Kind, Severity
from services.containerd.metadata import content, snapshots

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Mapping
    from pathlib import Path

    from services.common.database import Database


@frozen
class Records:
    """What rows say that there are files of.

    Attributes:
        blobs: sizes by digest.
        ingests: ids.
        snapshots: by the name of each snapshotter that keeps directories, rows by their ids.
    """

    blobs: Mapping[str, int]
    ingests: frozenset[str]
    snapshots: Mapping[str, Mapping[int, snapshots.SnapshotRow]]


def read(tx: sqlite3.Connection, snapshotters: tuple[str, ...]) -> Records:
    """All rows that have files."""
    return Records(
        content.all_sizes(tx),
        frozenset(str(row["id"]) for row in content.all_ingests(tx)),
        {name: {row.id: row for row in snapshots.all_of(tx, name)} for name in snapshotters},
    )


async def look(db: Database, root: Path, snapshotters: tuple[str, ...]) -> list[Finding]:
    """Compare all rows with the files below ``root``. Nobody may write meanwhile."""
    records = await db.read(lambda tx: read(tx, snapshotters))
    return await asyncio.to_thread(compare, records, root)


def compare(records: Records, root: Path) -> list[Finding]:
    """Compare rows with files."""
    return [
        *_blobs(records, root / "content" / "blobs"),
        *_ingests(records, root / "content" / "ingest"),
        *(
            finding
            for name in sorted(records.snapshots)
            for finding in _snapshots(name, records.snapshots[name], root / "snapshots" / name)
        ),
    ]


def name_of(snapshotter: str, row: snapshots.SnapshotRow) -> str:
    """What a finding calls a snapshot."""
    return f"{snapshotter}/{row.namespace}/{row.key}"


def _blobs(records: Records, directory: Path) -> list[Finding]:
    found = []
    present: dict[str, int] = {}
    for algorithm in _names(directory):
        with os.scandir(directory / algorithm) as entries:
            for entry in entries:
                status = entry.stat(follow_symlinks=False)
                present[f"{algorithm}:{entry.name}"] = status.st_size
    for digest, size in sorted(records.blobs.items()):
        there = present.get(digest)
        if there is None:
            found.append(Finding(Severity.DAMAGE, Kind.BLOB, digest, "its file is missing"))
        elif there != size:
            text = f"its file has {there} bytes, recorded are {size}"
            found.append(Finding(Severity.DAMAGE, Kind.BLOB, digest, text))
    for digest in sorted(present.keys() - records.blobs.keys()):
        text = f"a file of {present[digest]} bytes that nothing is recorded of"
        found.append(Finding(Severity.LEFTOVER, Kind.BLOB, digest, text))
    return found


def _ingests(records: Records, directory: Path) -> list[Finding]:
    present = set(_names(directory))
    found = [
        Finding(Severity.LEFTOVER, Kind.INGEST, name, "a directory that nothing is recorded of")
        for name in sorted(present - records.ingests)
    ]
    found += [
        Finding(Severity.LEFTOVER, Kind.INGEST, name, "it is recorded and has no data")
        for name in sorted(records.ingests - present)
    ]
    return found


def _snapshots(
    name: str, recorded: Mapping[int, snapshots.SnapshotRow], directory: Path
) -> list[Finding]:
    present = set(_names(directory))
    found = []
    for snapshot_id, row in sorted(recorded.items()):
        if (directory / str(snapshot_id) / "fs").is_dir():
            continue
        committed = row.kind == snapshots.COMMITTED
        kind = Kind.COMMITTED if committed else Kind.ACTIVE
        found.append(Finding(Severity.DAMAGE, kind, name_of(name, row), "its files are missing"))
    for entry in sorted(present):
        if not (entry.isdigit() and int(entry) in recorded):
            place = f"snapshots/{name}/{entry}"
            text = "nothing is recorded of it"
            found.append(Finding(Severity.LEFTOVER, Kind.DIRECTORY, place, text))
    return found


def _names(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir()] if directory.is_dir() else []
