"""Rows of ``leases`` and ``lease_resources``. Every function takes the transaction first."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from services.common.errors import NotFound

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Mapping


def add_resource(
    tx: sqlite3.Connection, namespace: str, lease_id: str, resource_type: str, resource_id: str
) -> None:
    """Put a resource under a lease, again if need be; an empty ``lease_id`` does nothing.

    Raises:
        NotFound: there is no such lease.
    """
    if not lease_id:
        return
    require(tx, namespace, lease_id)
    tx.execute(
        "INSERT OR IGNORE INTO lease_resources VALUES (?, ?, ?, ?)",
        (namespace, lease_id, resource_type, resource_id),
    )


def remove_resource(
    tx: sqlite3.Connection, namespace: str, lease_id: str, resource_type: str, resource_id: str
) -> None:
    """Take a resource from a lease; an empty ``lease_id`` does nothing."""
    tx.execute(
        "DELETE FROM lease_resources WHERE namespace = ? AND lease = ? AND type = ? AND id = ?",
        (namespace, lease_id, resource_type, resource_id),
    )


def require(tx: sqlite3.Connection, namespace: str, lease_id: str) -> None:
    """Fail unless there is that lease.

    Raises:
        NotFound: there is none.
    """
    row = tx.execute(
        "SELECT 1 FROM leases WHERE namespace = ? AND id = ?", (namespace, lease_id)
    ).fetchone()
    if row is None:
        raise NotFound(
            f"lease {lease_id!r} does not exist: it expired or was deleted; make a new one",
            resource=("lease", lease_id),
        )


def insert(
    tx: sqlite3.Connection,
    namespace: str,
    lease_id: str,
    labels: Mapping[str, str],
    *,
    now_ns: int,
) -> bool:
    """Record a lease; False if the id is taken."""
    cursor = tx.execute(
        "INSERT OR IGNORE INTO leases VALUES (?, ?, ?, ?)",
        (namespace, lease_id, json.dumps(dict(labels)), now_ns),
    )
    return cursor.rowcount == 1


def delete(tx: sqlite3.Connection, namespace: str, lease_id: str) -> bool:
    """Forget a lease with its list of resources; False if there is none."""
    cursor = tx.execute("DELETE FROM leases WHERE namespace = ? AND id = ?", (namespace, lease_id))
    return cursor.rowcount == 1


def list_all(tx: sqlite3.Connection, namespace: str) -> list[sqlite3.Row]:
    """Every lease of a namespace, by id."""
    return tx.execute(
        "SELECT * FROM leases WHERE namespace = ? ORDER BY id", (namespace,)
    ).fetchall()


def list_labelled(tx: sqlite3.Connection, label: str) -> list[sqlite3.Row]:
    """Leases of all namespaces that may have a label: its name is in their text."""
    return tx.execute(
        "SELECT namespace, id, labels FROM leases WHERE instr(labels, ?)", (label,)
    ).fetchall()


def resources(tx: sqlite3.Connection, namespace: str, lease_id: str) -> list[sqlite3.Row]:
    """``type`` and ``id`` of what a lease keeps."""
    return tx.execute(
        "SELECT type, id FROM lease_resources WHERE namespace = ? AND lease = ? ORDER BY type, id",
        (namespace, lease_id),
    ).fetchall()


def forget_resource(
    tx: sqlite3.Connection, namespace: str, resource_type: str, resource_id: str
) -> None:
    """Take a resource, which is no more, from every lease of its namespace."""
    tx.execute(
        "DELETE FROM lease_resources WHERE namespace = ? AND type = ? AND id = ?",
        (namespace, resource_type, resource_id),
    )
