"""Rows of ``namespaces``. Every function takes the transaction first.

A namespace also comes to be when something is first recorded in it; triggers of the schema do that.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Mapping


def get(tx: sqlite3.Connection, name: str) -> dict[str, str] | None:
    """The labels of a namespace; None if there is none of that name."""
    row = tx.execute("SELECT labels FROM namespaces WHERE name = ?", (name,)).fetchone()
    return None if row is None else json.loads(row["labels"])


def list_all(tx: sqlite3.Connection) -> list[tuple[str, dict[str, str]]]:
    """Name and labels of every namespace, by name."""
    rows = tx.execute("SELECT name, labels FROM namespaces ORDER BY name")
    return [(row["name"], json.loads(row["labels"])) for row in rows]


def insert(tx: sqlite3.Connection, name: str, labels: Mapping[str, str]) -> bool:
    """Record a namespace; False if there is one of that name."""
    cursor = tx.execute(
        "INSERT OR IGNORE INTO namespaces VALUES (?, ?)", (name, json.dumps(dict(labels)))
    )
    return cursor.rowcount == 1


def set_labels(tx: sqlite3.Connection, name: str, labels: Mapping[str, str]) -> None:
    """Replace the labels of a namespace; one that does not exist comes to be."""
    tx.execute(
        "INSERT INTO namespaces VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET labels = ?",
        (name, json.dumps(dict(labels)), json.dumps(dict(labels))),
    )


def delete(tx: sqlite3.Connection, name: str) -> bool:
    """Forget a namespace and its leases; False if there was none of that name."""
    tx.execute("DELETE FROM leases WHERE namespace = ?", (name,))
    return tx.execute("DELETE FROM namespaces WHERE name = ?", (name,)).rowcount == 1


def contents(tx: sqlite3.Connection, name: str) -> list[str]:
    """What kinds of things a namespace still holds, in words."""
    kinds = [
        noun
        for noun, table in (
            ("images", "images"),
            ("blobs", "content"),
            ("containers", "containers"),
            ("sandboxes", "sandboxes"),
        )
        if tx.execute(f"SELECT 1 FROM {table} WHERE namespace = ? LIMIT 1", (name,)).fetchone()
    ]
    rows = tx.execute(
        "SELECT DISTINCT snapshotter FROM snapshots WHERE namespace = ? ORDER BY snapshotter",
        (name,),
    )
    return kinds + [f"snapshots on {row[0]!r} snapshotter" for row in rows]
