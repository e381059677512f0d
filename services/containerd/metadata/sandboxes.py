"""Rows of ``sandboxes``. Every function takes the transaction first."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Mapping


def get(tx: sqlite3.Connection, namespace: str, sandbox_id: str) -> sqlite3.Row | None:
    """The row of a sandbox."""
    row: sqlite3.Row | None = tx.execute(
        "SELECT * FROM sandboxes WHERE namespace = ? AND id = ?", (namespace, sandbox_id)
    ).fetchone()
    return row


def list_all(tx: sqlite3.Connection, namespace: str) -> list[sqlite3.Row]:
    """Every sandbox of a namespace, by id."""
    return tx.execute(
        "SELECT * FROM sandboxes WHERE namespace = ? ORDER BY id", (namespace,)
    ).fetchall()


def put(
    tx: sqlite3.Connection,
    namespace: str,
    sandbox_id: str,
    *,
    labels: Mapping[str, str],
    runtime_name: str,
    runtime_options: tuple[str, bytes],
    spec: tuple[str, bytes],
    extensions: Mapping[str, tuple[str, str]],
    sandboxer: str,
    created_at_ns: int,
    updated_at_ns: int,
) -> None:
    """Record a sandbox, in place of one that has the id.

    Options and spec are pairs of type URL and bytes; extensions pairs of type URL and base64.
    """
    tx.execute(
        "INSERT OR REPLACE INTO sandboxes VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            namespace,
            sandbox_id,
            json.dumps(dict(labels)),
            runtime_name,
            *runtime_options,
            *spec,
            json.dumps({name: list(pair) for name, pair in extensions.items()}),
            sandboxer,
            created_at_ns,
            updated_at_ns,
        ),
    )


def delete(tx: sqlite3.Connection, namespace: str, sandbox_id: str) -> bool:
    """Forget a sandbox; False if there is none of that id."""
    cursor = tx.execute(
        "DELETE FROM sandboxes WHERE namespace = ? AND id = ?", (namespace, sandbox_id)
    )
    return cursor.rowcount == 1
