"""Figures about everything that is recorded, for metrics. The transaction comes first."""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.common.frozen import frozen

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Mapping

_TABLES = ("namespaces", "blobs", "ingests", "images", "snapshots", "containers", "leases")


@frozen
class Figures:
    """How much there is. ``objects`` counts rows by the name of their table."""

    journal_seq: int
    content_bytes: int
    objects: Mapping[str, int]


def read(tx: sqlite3.Connection) -> Figures:
    """The figures of this moment."""
    seq = tx.execute("SELECT ifnull(max(seq), 0) FROM journal").fetchone()[0]
    size = tx.execute("SELECT ifnull(sum(size_bytes), 0) FROM blobs").fetchone()[0]
    counts = {
        table: int(tx.execute(f"SELECT count(*) FROM {table}").fetchone()[0]) for table in _TABLES
    }
    return Figures(int(seq), int(size), counts)
