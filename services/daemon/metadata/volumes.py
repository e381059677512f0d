"""Rows of named volumes. The directory of a volume is made before its row and outlives it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from services.common.frozen import frozen

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Mapping

VOLUMES_DDL = """
-- volumes whose directory <root>/volumes/<name>/_data exists
CREATE TABLE volumes (
    name TEXT PRIMARY KEY,
    driver TEXT NOT NULL,
    labels TEXT NOT NULL DEFAULT '{}',
    options TEXT NOT NULL DEFAULT '{}',   -- of the driver
    anonymous INTEGER NOT NULL,           -- 1: made for a container, without a name from a user
    copying INTEGER NOT NULL DEFAULT 0,   -- 1: an image's content is being copied into it
    created_at_ns INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
"""


@frozen
class VolumeRow:
    """One volume as recorded."""

    name: str
    driver: str
    labels: Mapping[str, str]
    options: Mapping[str, str]
    anonymous: bool
    copying: bool
    created_at_ns: int


def insert(tx: sqlite3.Connection, row: VolumeRow) -> bool:
    """Record a volume; False when the name is taken, and nothing is changed."""
    cursor = tx.execute(
        "INSERT OR IGNORE INTO volumes "
        "(name, driver, labels, options, anonymous, copying, created_at_ns) "
        "VALUES (?, ?, ?, ?, ?, ?, ?)",
        (
            row.name,
            row.driver,
            json.dumps(dict(row.labels)),
            json.dumps(dict(row.options)),
            int(row.anonymous),
            int(row.copying),
            row.created_at_ns,
        ),
    )
    return cursor.rowcount == 1


def get(tx: sqlite3.Connection, name: str) -> VolumeRow | None:
    """One volume, or None."""
    row = tx.execute("SELECT * FROM volumes WHERE name = ?", (name,)).fetchone()
    return None if row is None else _row(row)


def list_all(tx: sqlite3.Connection) -> list[VolumeRow]:
    """All volumes by name."""
    return [_row(row) for row in tx.execute("SELECT * FROM volumes ORDER BY name")]


def delete(tx: sqlite3.Connection, name: str) -> None:
    """Forget a volume."""
    tx.execute("DELETE FROM volumes WHERE name = ?", (name,))


def set_copying(tx: sqlite3.Connection, name: str, copying: bool) -> None:
    """Note that a copy into the volume begins, or has ended."""
    tx.execute("UPDATE volumes SET copying = ? WHERE name = ?", (int(copying), name))


def _row(row: sqlite3.Row) -> VolumeRow:
    return VolumeRow(
        name=row["name"],
        driver=row["driver"],
        labels=json.loads(row["labels"]),
        options=json.loads(row["options"]),
        anonymous=bool(row["anonymous"]),
        copying=bool(row["copying"]),
        created_at_ns=row["created_at_ns"],
    )
