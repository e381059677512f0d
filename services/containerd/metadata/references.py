"""What the collector reads of everything, and what it deletes. The transaction comes first.

Rows that are deleted here are those that nothing refers to; their files are the business of the
content store and of the snapshotters, which remove what has no row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import sqlite3


def leases(tx: sqlite3.Connection) -> list[sqlite3.Row]:
    """``namespace``, ``id`` and ``labels`` of every lease."""
    return tx.execute("SELECT namespace, id, labels FROM leases").fetchall()


def lease_resources(tx: sqlite3.Connection) -> list[sqlite3.Row]:
    """``namespace``, ``lease``, ``type`` and ``id`` of all that leases keep."""
    return tx.execute("SELECT namespace, lease, type, id FROM lease_resources").fetchall()


def images(tx: sqlite3.Connection) -> list[sqlite3.Row]:
    """``namespace``, ``name``, ``digest`` and ``labels`` of every image."""
    return tx.execute("SELECT namespace, name, digest, labels FROM images").fetchall()


def content(tx: sqlite3.Connection) -> list[sqlite3.Row]:
    """``namespace``, ``digest`` and ``labels`` of every blob in every namespace."""
    return tx.execute("SELECT namespace, digest, labels FROM content").fetchall()


def ingests(tx: sqlite3.Connection) -> list[sqlite3.Row]:
    """``namespace``, ``ref``, ``expected`` and ``updated_at_ns`` of every ingest."""
    return tx.execute("SELECT namespace, ref, expected, updated_at_ns FROM ingests").fetchall()


def containers(tx: sqlite3.Connection) -> list[sqlite3.Row]:
    """``namespace``, ``id``, ``snapshotter``, ``snapshot_key`` and ``labels`` of containers."""
    return tx.execute(
        "SELECT namespace, id, snapshotter, snapshot_key, labels FROM containers"
    ).fetchall()


def snapshots(tx: sqlite3.Connection) -> list[sqlite3.Row]:
    """``namespace``, ``snapshotter``, ``key``, ``parent`` (empty: none) and ``labels``."""
    return tx.execute(
        "SELECT s.namespace, s.snapshotter, s.key, coalesce(p.key, '') AS parent, s.labels "
        "FROM snapshots AS s LEFT JOIN snapshots AS p ON p.id = s.parent_id"
    ).fetchall()


def delete_snapshot(tx: sqlite3.Connection, namespace: str, snapshotter: str, key: str) -> None:
    """Delete the row of a snapshot that nothing stands on."""
    tx.execute(
        "DELETE FROM snapshots WHERE namespace = ? AND snapshotter = ? AND key = ?",
        (namespace, snapshotter, key),
    )
