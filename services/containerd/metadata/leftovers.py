"""Rows of ``snapshot_leftovers``: what another service may keep, and no snapshot refers to.

A trigger adds what a snapshot's row named when that row goes, whoever deletes it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import sqlite3


def add(tx: sqlite3.Connection, snapshotter: str, namespace: str, backend: str) -> None:
    """Note a name that may come to be there."""
    tx.execute(
        "INSERT OR IGNORE INTO snapshot_leftovers (snapshotter, namespace, backend)"
        " VALUES (?, ?, ?)",
        (snapshotter, namespace, backend),
    )


def forget(tx: sqlite3.Connection, snapshotter: str, namespace: str, backend: str) -> None:
    """Strike a name out: it is not there any more, or a snapshot has it."""
    tx.execute(
        "DELETE FROM snapshot_leftovers WHERE snapshotter = ? AND namespace = ? AND backend = ?",
        (snapshotter, namespace, backend),
    )


def list_all(tx: sqlite3.Connection, snapshotter: str) -> list[tuple[str, str]]:
    """Namespace and name of every one, children before their parents."""
    found = tx.execute(
        "SELECT namespace, backend FROM snapshot_leftovers WHERE snapshotter = ? ORDER BY id",
        (snapshotter,),
    )
    return [(row["namespace"], row["backend"]) for row in found]
