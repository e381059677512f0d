"""Rows of ``journal`` and ``shim_progress``. Every function takes the transaction first.

The newest row is never deleted: the next sequence number follows from it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import sqlite3


def append(
    tx: sqlite3.Connection,
    *,
    timestamp_ns: int,
    namespace: str,
    topic: str,
    type_url: str,
    value: bytes,
    shim: str | None = None,
    shim_seq: int | None = None,
) -> int:
    """Add an event at the end; returns its sequence number."""
    row = tx.execute(
        "INSERT INTO journal SELECT ifnull(max(seq), 0) + 1, ?, ?, ?, ?, ?, ?, ? FROM journal "
        "RETURNING seq",
        (timestamp_ns, namespace, topic, type_url, value, shim, shim_seq),
    ).fetchone()
    return int(row[0])


def bounds(tx: sqlite3.Connection) -> tuple[int, int]:
    """The first and the last sequence number; (1, 0) when there was never an event."""
    # Two queries in one: SQLite looks a minimum or a maximum up, but reads all for both together.
    row = tx.execute(
        "SELECT ifnull((SELECT min(seq) FROM journal), 1),"
        " ifnull((SELECT max(seq) FROM journal), 0)"
    ).fetchone()
    return int(row[0]), int(row[1])


def read(tx: sqlite3.Connection, from_seq: int, *, limit: int) -> list[sqlite3.Row]:
    """At most ``limit`` events from a sequence number on."""
    return tx.execute(
        "SELECT seq, timestamp_ns, namespace, topic, type_url, value FROM journal "
        "WHERE seq >= ? ORDER BY seq LIMIT ?",
        (from_seq, limit),
    ).fetchall()


def first_within(tx: sqlite3.Connection, keep_bytes: int) -> int:
    """The first of the newest events that take so many bytes together; 0 if all of them do."""
    row = tx.execute(
        "SELECT max(seq) FROM (SELECT seq,"
        " sum(length(value) + length(topic) + length(type_url)) OVER (ORDER BY seq DESC) AS bytes"
        " FROM journal) WHERE bytes > ?",
        (keep_bytes,),
    ).fetchone()
    return 0 if row[0] is None else int(row[0]) + 1


def truncate(tx: sqlite3.Connection, *, keep: int, older_than_ns: int, first: int = 0) -> int:
    """Delete events past the newest ``keep``, from before a time, and before ``first``.

    Returns how many.
    """
    row = tx.execute("SELECT max(seq) FROM journal").fetchone()
    if row[0] is None:
        return 0
    newest = int(row[0])
    young = tx.execute(
        "SELECT seq FROM journal WHERE timestamp_ns >= ? ORDER BY seq LIMIT 1", (older_than_ns,)
    ).fetchone()
    first = max(first, newest - keep + 1, newest if young is None else int(young[0]))
    return tx.execute("DELETE FROM journal WHERE seq < ?", (min(first, newest),)).rowcount


def shim_progress(tx: sqlite3.Connection, shim: str) -> int:
    """The last event of a shim that is in the journal; 0 for none."""
    row = tx.execute("SELECT last_seq FROM shim_progress WHERE shim = ?", (shim,)).fetchone()
    return 0 if row is None else int(row[0])


def set_shim_progress(tx: sqlite3.Connection, shim: str, last_seq: int) -> None:
    """Record how far a shim's events are in the journal."""
    tx.execute(
        "INSERT INTO shim_progress VALUES (?, ?) ON CONFLICT (shim) DO UPDATE SET last_seq = ?",
        (shim, last_seq, last_seq),
    )


def forget_shim(tx: sqlite3.Connection, shim: str) -> None:
    """Forget how far a shim was: it is gone for ever."""
    tx.execute("DELETE FROM shim_progress WHERE shim = ?", (shim,))
