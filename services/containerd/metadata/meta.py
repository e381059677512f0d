"""Rows of ``meta``: single facts about this root. Every function takes the transaction first."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import sqlite3


def next_epoch(tx: sqlite3.Connection) -> int:
    """Count a start of containerd on this root; returns the number of this one, from 1."""
    row = tx.execute(
        "INSERT INTO meta VALUES ('epoch', '1') "
        "ON CONFLICT (key) DO UPDATE SET value = CAST(CAST(value AS INTEGER) + 1 AS TEXT) "
        "RETURNING value"
    ).fetchone()
    return int(row[0])


def setdefault(tx: sqlite3.Connection, key: str, value: str) -> str:
    """The value of a fact, which becomes ``value`` if there was none."""
    tx.execute("INSERT OR IGNORE INTO meta VALUES (?, ?)", (key, value))
    row = tx.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
    return str(row[0])


def begin_run(tx: sqlite3.Connection) -> bool:
    """Note that a process works on this root; returns whether the one before it ended by itself."""
    row = tx.execute("SELECT value FROM meta WHERE key = 'running'").fetchone()
    tx.execute("INSERT OR REPLACE INTO meta VALUES ('running', '1')")
    return row is None or row[0] == "0"


def end_run(tx: sqlite3.Connection) -> None:
    """Note that the process that works on this root ends by itself."""
    tx.execute("INSERT OR REPLACE INTO meta VALUES ('running', '0')")
