"""Rows of ``blobs``, ``content`` and ``ingests``. Every function takes the transaction first.

``blobs`` has a row for each file that is complete, whoever sees it; ``content`` says which
namespace sees it. Labels go in and out as mappings, the rest of a row comes as ``sqlite3.Row``.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Mapping

_SELECT = """
SELECT content.digest, size_bytes, labels, created_at_ns, updated_at_ns
FROM content JOIN blobs ON blobs.digest = content.digest
"""


def blob_size(tx: sqlite3.Connection, digest: str) -> int | None:
    """Size of a blob that any namespace may have; None if there is no such file."""
    row = tx.execute("SELECT size_bytes FROM blobs WHERE digest = ?", (digest,)).fetchone()
    return None if row is None else int(row[0])


def get(tx: sqlite3.Connection, namespace: str, digest: str) -> sqlite3.Row | None:
    """What a namespace has recorded of a blob."""
    row: sqlite3.Row | None = tx.execute(
        _SELECT + "WHERE namespace = ? AND content.digest = ?", (namespace, digest)
    ).fetchone()
    return row


def list_all(tx: sqlite3.Connection, namespace: str) -> list[sqlite3.Row]:
    """Every blob of a namespace, by digest."""
    return tx.execute(
        _SELECT + "WHERE namespace = ? ORDER BY content.digest", (namespace,)
    ).fetchall()


def insert(
    tx: sqlite3.Connection,
    namespace: str,
    digest: str,
    *,
    size_bytes: int,
    labels: Mapping[str, str],
    now_ns: int,
) -> bool:
    """Record a blob whose file is in place; False if the namespace had it already."""
    tx.execute("INSERT OR IGNORE INTO blobs VALUES (?, ?)", (digest, size_bytes))
    cursor = tx.execute(
        "INSERT OR IGNORE INTO content VALUES (?, ?, ?, ?, ?)",
        (namespace, digest, json.dumps(dict(labels)), now_ns, now_ns),
    )
    return cursor.rowcount == 1


def set_labels(
    tx: sqlite3.Connection, namespace: str, digest: str, labels: Mapping[str, str], *, now_ns: int
) -> None:
    """Replace the labels of a blob in a namespace."""
    tx.execute(
        "UPDATE content SET labels = ?, updated_at_ns = ? WHERE namespace = ? AND digest = ?",
        (json.dumps(dict(labels)), now_ns, namespace, digest),
    )


def delete(tx: sqlite3.Connection, namespace: str, digest: str) -> bool:
    """Take a blob from a namespace; False if it was not there. The blob's own row stays."""
    cursor = tx.execute(
        "DELETE FROM content WHERE namespace = ? AND digest = ?", (namespace, digest)
    )
    return cursor.rowcount == 1


def release_blob(tx: sqlite3.Connection, digest: str) -> bool:
    """Forget a blob that no namespace has or takes over; True if its file is to be removed now."""
    cursor = tx.execute(
        "DELETE FROM blobs WHERE digest = ? "
        "AND NOT EXISTS (SELECT 1 FROM content WHERE content.digest = blobs.digest) "
        "AND NOT EXISTS (SELECT 1 FROM ingests WHERE ingests.expected = blobs.digest)",
        (digest,),
    )
    return cursor.rowcount == 1


def forget_lost_blob(tx: sqlite3.Connection, digest: str) -> None:
    """Drop every row of a blob whose file is gone."""
    tx.execute("DELETE FROM content WHERE digest = ?", (digest,))
    tx.execute("DELETE FROM blobs WHERE digest = ?", (digest,))


def all_blobs(tx: sqlite3.Connection) -> list[tuple[str, bool]]:
    """Every blob, and whether some namespace has it."""
    rows = tx.execute(
        "SELECT digest, EXISTS (SELECT 1 FROM content WHERE content.digest = blobs.digest) "
        "FROM blobs ORDER BY digest"
    )
    return [(row[0], bool(row[1])) for row in rows]


def all_sizes(tx: sqlite3.Connection) -> dict[str, int]:
    """The size of every blob by its digest."""
    return dict(tx.execute("SELECT digest, size_bytes FROM blobs").fetchall())


def all_labels(tx: sqlite3.Connection) -> list[tuple[str, str, dict[str, str]]]:
    """Namespace, digest and labels of every blob in every namespace."""
    rows = tx.execute("SELECT namespace, digest, labels FROM content ORDER BY namespace, digest")
    return [(row[0], row[1], json.loads(row[2])) for row in rows]


def get_ingest(tx: sqlite3.Connection, namespace: str, ref: str) -> sqlite3.Row | None:
    """The row of an ingest."""
    row: sqlite3.Row | None = tx.execute(
        "SELECT * FROM ingests WHERE namespace = ? AND ref = ?", (namespace, ref)
    ).fetchone()
    return row


def list_ingests(tx: sqlite3.Connection, namespace: str) -> list[sqlite3.Row]:
    """Every ingest of a namespace, by ref."""
    return tx.execute(
        "SELECT * FROM ingests WHERE namespace = ? ORDER BY ref", (namespace,)
    ).fetchall()


def all_ingests(tx: sqlite3.Connection) -> list[sqlite3.Row]:
    """Every ingest of every namespace."""
    return tx.execute("SELECT * FROM ingests ORDER BY namespace, ref").fetchall()


def put_ingest(
    tx: sqlite3.Connection,
    namespace: str,
    ref: str,
    *,
    ingest_id: str,
    total_bytes: int,
    expected: str,
    now_ns: int,
) -> dict[str, Any]:
    """Record an ingest, or what is new about one; returns its row as it is now."""
    tx.execute(
        "INSERT INTO ingests VALUES (?, ?, ?, ?, ?, '{}', ?, ?) "
        "ON CONFLICT (namespace, ref) DO UPDATE SET "
        "total_bytes = iif(excluded.total_bytes > 0, excluded.total_bytes, total_bytes), "
        "expected = iif(excluded.expected <> '', excluded.expected, expected), "
        "updated_at_ns = excluded.updated_at_ns",
        (namespace, ref, ingest_id, total_bytes, expected, now_ns, now_ns),
    )
    row = get_ingest(tx, namespace, ref)
    assert row is not None, "a row that was just written is there"
    return dict(row)


def delete_ingest(tx: sqlite3.Connection, namespace: str, ref: str) -> str | None:
    """Forget an ingest; returns the id of the directory that is rubbish now."""
    row = tx.execute(
        "DELETE FROM ingests WHERE namespace = ? AND ref = ? RETURNING id", (namespace, ref)
    ).fetchone()
    return None if row is None else str(row[0])
