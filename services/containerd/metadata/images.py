"""Rows of ``images``. Every function takes the transaction first."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Mapping


def get(tx: sqlite3.Connection, namespace: str, name: str) -> sqlite3.Row | None:
    """The row of an image."""
    row: sqlite3.Row | None = tx.execute(
        "SELECT * FROM images WHERE namespace = ? AND name = ?", (namespace, name)
    ).fetchone()
    return row


def list_all(tx: sqlite3.Connection, namespace: str) -> list[sqlite3.Row]:
    """Every image of a namespace, by name."""
    return tx.execute(
        "SELECT * FROM images WHERE namespace = ? ORDER BY name", (namespace,)
    ).fetchall()


def put(
    tx: sqlite3.Connection,
    namespace: str,
    name: str,
    *,
    media_type: str,
    digest: str,
    size_bytes: int,
    annotations: Mapping[str, str],
    labels: Mapping[str, str],
    created_at_ns: int,
    updated_at_ns: int,
) -> None:
    """Record an image, in place of one that has the name."""
    tx.execute(
        "INSERT OR REPLACE INTO images VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            namespace,
            name,
            media_type,
            digest,
            size_bytes,
            json.dumps(dict(annotations)),
            json.dumps(dict(labels)),
            created_at_ns,
            updated_at_ns,
        ),
    )


def delete(tx: sqlite3.Connection, namespace: str, name: str) -> bool:
    """Forget an image; False if there is none of that name."""
    cursor = tx.execute("DELETE FROM images WHERE namespace = ? AND name = ?", (namespace, name))
    return cursor.rowcount == 1


def all_targets(tx: sqlite3.Connection) -> list[sqlite3.Row]:
    """``media_type``, ``digest`` and ``size_bytes`` of every image of every namespace."""
    return tx.execute("SELECT DISTINCT media_type, digest, size_bytes FROM images").fetchall()
