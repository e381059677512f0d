"""Migrations of the database: each keeps what was recorded, and a program of before can go on."""

from __future__ import annotations

import sqlite3
from typing import TYPE_CHECKING

from services.common.database import Database
from services.containerd.metadata import leftovers
from services.containerd.metadata import snapshots as rows
from services.containerd.metadata.schema import MIGRATIONS

if TYPE_CHECKING:
    from pathlib import Path

_INSERT = (
    "INSERT INTO snapshots (id, snapshotter, namespace, key, kind, created_at_ns, updated_at_ns)"
    " VALUES (?, 'overlayfs', 'a', ?, 3, 1, 1)"
)


async def test_snapshots_of_version_1_are_directories_of_ours(tmp_path: Path) -> None:
    db = Database(tmp_path / "meta.db")
    db.open(MIGRATIONS[:1])
    await db.write(lambda tx: tx.execute(_INSERT, (7, "old")))
    db.close()
    db = Database(tmp_path / "meta.db")
    db.open(MIGRATIONS[:2])
    row = await db.read(lambda tx: rows.get(tx, rows.Space("overlayfs", "a"), "old"))
    assert (row.id, row.backend, row.parent_backend) == (7, "", "")
    await db.write(lambda tx: tx.execute("DELETE FROM snapshots"))
    assert await db.read(lambda tx: leftovers.list_all(tx, "overlayfs")) == []
    db.close()
    backup = sqlite3.connect(tmp_path / "meta.db.v1.bak")
    assert backup.execute("SELECT key FROM snapshots").fetchall() == [("old",)]
    backup.close()


async def test_version_1_goes_on_with_a_database_of_version_2(tmp_path: Path) -> None:
    db = Database(tmp_path / "meta.db")
    db.open(MIGRATIONS[:2])
    db.close()
    db = Database(tmp_path / "meta.db")
    db.open(MIGRATIONS[:1])
    await db.write(lambda tx: tx.execute(_INSERT, (8, "new")))
    db.close()
    db = Database(tmp_path / "meta.db")
    db.open(MIGRATIONS[:2])
    row = await db.read(lambda tx: rows.get(tx, rows.Space("overlayfs", "a"), "new"))
    assert row.backend == ""
    db.close()
