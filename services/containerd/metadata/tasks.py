"""What is read of a shim's rows in ``journal``. Every function takes the transaction first."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Sequence


def last_topic(tx: sqlite3.Connection, shim: str) -> str:
    """Topic of the last event of a shim that is in the journal; empty for none."""
    row = tx.execute(
        "SELECT topic FROM journal WHERE shim = ? ORDER BY shim_seq DESC LIMIT 1", (shim,)
    ).fetchone()
    return "" if row is None else str(row["topic"])


def shim_events(
    tx: sqlite3.Connection, shim: str, topics: Sequence[str]
) -> list[tuple[str, bytes]]:
    """Type and bytes of a shim's events under some topics, in the order in which it sent them."""
    marks = ", ".join("?" * len(topics))
    found = tx.execute(
        f"SELECT type_url, value FROM journal WHERE shim = ? AND topic IN ({marks}) "
        "ORDER BY shim_seq",
        (shim, *topics),
    )
    return [(row["type_url"], bytes(row["value"])) for row in found]
