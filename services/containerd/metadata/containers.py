"""Rows of ``containers``. Every function takes the transaction first."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Mapping


def get(tx: sqlite3.Connection, namespace: str, container_id: str) -> sqlite3.Row | None:
    """The row of a container."""
    row: sqlite3.Row | None = tx.execute(
        "SELECT * FROM containers WHERE namespace = ? AND id = ?", (namespace, container_id)
    ).fetchone()
    return row


def exists(tx: sqlite3.Connection, namespace: str, container_id: str) -> bool:
    """Whether there is a container of that id."""
    found = tx.execute(
        "SELECT 1 FROM containers WHERE namespace = ? AND id = ?", (namespace, container_id)
    ).fetchone()
    return found is not None


def list_all(tx: sqlite3.Connection, namespace: str) -> list[sqlite3.Row]:
    """Every container of a namespace, by id."""
    return tx.execute(
        "SELECT * FROM containers WHERE namespace = ? ORDER BY id", (namespace,)
    ).fetchall()


def put(
    tx: sqlite3.Connection,
    namespace: str,
    container_id: str,
    *,
    labels: Mapping[str, str],
    image: str,
    runtime_name: str,
    runtime_options: tuple[str, bytes],
    spec: tuple[str, bytes],
    snapshotter: str,
    snapshot_key: str,
    extensions: Mapping[str, tuple[str, str]],
    sandbox: str,
    created_at_ns: int,
    updated_at_ns: int,
) -> None:
    """Record a container, in place of one that has the id.

    Options and spec are pairs of type URL and bytes; extensions pairs of type URL and base64.
    """
    tx.execute(
        "INSERT OR REPLACE INTO containers VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            namespace,
            container_id,
            json.dumps(dict(labels)),
            image,
            runtime_name,
            *runtime_options,
            *spec,
            snapshotter,
            snapshot_key,
            json.dumps({name: list(pair) for name, pair in extensions.items()}),
            sandbox,
            created_at_ns,
            updated_at_ns,
        ),
    )


def delete(tx: sqlite3.Connection, namespace: str, container_id: str) -> bool:
    """Forget a container; False if there is none of that id."""
    cursor = tx.execute(
        "DELETE FROM containers WHERE namespace = ? AND id = ?", (namespace, container_id)
    )
    return cursor.rowcount == 1
