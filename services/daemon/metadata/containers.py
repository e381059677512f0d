"""Rows of containers, exec sessions and tombstones, and the place in containerd's journal.

Every function takes the transaction first. Records travel as JSON objects: their meaning is
:mod:`services.daemon.containers.codec`'s business.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from services.common.frozen import frozen

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterable, Mapping

_JOURNAL_SEQ = "journal_seq"


@frozen
class ContainerRow:
    """One container; ``record`` is what the columns do not say."""

    id: str
    name: str
    state: str
    image_id: str
    record: Mapping[str, Any]


@frozen
class ExecRow:
    """One exec session."""

    id: str
    container_id: str
    record: Mapping[str, Any]


@frozen
class TombstoneRow:
    """What is kept of a removed container."""

    id: str
    name: str
    exit_status: Mapping[str, Any] | None
    removed_at_ns: int


def insert(tx: sqlite3.Connection, row: ContainerRow) -> None:
    """Record a container; its id and its name are free (see :func:`name_owner`)."""
    tx.execute(
        "INSERT INTO containers (id, name, state, image_id, record) VALUES (?, ?, ?, ?, ?)",
        (row.id, row.name, row.state, row.image_id, _dump(row.record)),
    )


def update(tx: sqlite3.Connection, row: ContainerRow) -> None:
    """Replace the row of a container."""
    tx.execute(
        "UPDATE containers SET name = ?, state = ?, image_id = ?, record = ? WHERE id = ?",
        (row.name, row.state, row.image_id, _dump(row.record), row.id),
    )


def get(tx: sqlite3.Connection, container_id: str) -> ContainerRow | None:
    """The row of a container, or None."""
    found = tx.execute("SELECT * FROM containers WHERE id = ?", (container_id,)).fetchone()
    return None if found is None else _container(found)


def name_owner(tx: sqlite3.Connection, name: str) -> str:
    """Id of the container that has a name; empty when it is free."""
    found = tx.execute("SELECT id FROM containers WHERE name = ?", (name,)).fetchone()
    return "" if found is None else str(found[0])


def list_all(tx: sqlite3.Connection) -> list[ContainerRow]:
    """All containers."""
    return [_container(row) for row in tx.execute("SELECT * FROM containers")]


def delete(tx: sqlite3.Connection, container_id: str) -> None:
    """Forget a container with its exec sessions and its claims on volumes."""
    tx.execute("DELETE FROM containers WHERE id = ?", (container_id,))


def claim_volume(tx: sqlite3.Connection, container_id: str, volume: str) -> None:
    """Record that a container mounts a volume."""
    tx.execute(
        "INSERT OR IGNORE INTO volume_users (volume, container_id) VALUES (?, ?)",
        (volume, container_id),
    )


def volume_users(tx: sqlite3.Connection, volume: str) -> list[str]:
    """Ids of the containers that mount a volume."""
    rows = tx.execute(
        "SELECT container_id FROM volume_users WHERE volume = ? ORDER BY container_id", (volume,)
    )
    return [str(row[0]) for row in rows]


def release_volumes(tx: sqlite3.Connection, container_id: str) -> None:
    """Forget which volumes a container mounts."""
    tx.execute("DELETE FROM volume_users WHERE container_id = ?", (container_id,))


def put_exec(tx: sqlite3.Connection, row: ExecRow) -> None:
    """Record an exec session, or replace what is recorded of it."""
    tx.execute(
        "INSERT INTO execs (id, container_id, record) VALUES (?, ?, ?) "
        "ON CONFLICT (id) DO UPDATE SET record = excluded.record",
        (row.id, row.container_id, _dump(row.record)),
    )


def list_execs(tx: sqlite3.Connection) -> list[ExecRow]:
    """All exec sessions."""
    return [_exec(row) for row in tx.execute("SELECT * FROM execs")]


def get_exec(tx: sqlite3.Connection, exec_id: str) -> ExecRow | None:
    """An exec session, or None."""
    found = tx.execute("SELECT * FROM execs WHERE id = ?", (exec_id,)).fetchone()
    return None if found is None else _exec(found)


def execs_of(tx: sqlite3.Connection, container_id: str) -> list[ExecRow]:
    """The exec sessions of one container."""
    rows = tx.execute("SELECT * FROM execs WHERE container_id = ?", (container_id,))
    return [_exec(row) for row in rows]


def delete_execs(tx: sqlite3.Connection, ids: Iterable[str]) -> None:
    """Forget exec sessions."""
    tx.executemany("DELETE FROM execs WHERE id = ?", [(exec_id,) for exec_id in ids])


def put_tombstone(tx: sqlite3.Connection, row: TombstoneRow) -> None:
    """Keep what is left of a removed container."""
    tx.execute(
        "INSERT OR REPLACE INTO tombstones (id, name, exit_status, removed_at_ns) "
        "VALUES (?, ?, ?, ?)",
        (
            row.id,
            row.name,
            None if row.exit_status is None else _dump(row.exit_status),
            row.removed_at_ns,
        ),
    )


def has_tombstone(tx: sqlite3.Connection, container_id: str) -> bool:
    """Whether something is kept of a removed container."""
    found = tx.execute("SELECT 1 FROM tombstones WHERE id = ?", (container_id,)).fetchone()
    return found is not None


def list_tombstones(tx: sqlite3.Connection) -> list[TombstoneRow]:
    """All tombstones, oldest first."""
    return [
        TombstoneRow(
            row["id"],
            row["name"],
            None if row["exit_status"] is None else json.loads(row["exit_status"]),
            row["removed_at_ns"],
        )
        for row in tx.execute("SELECT * FROM tombstones ORDER BY removed_at_ns")
    ]


def delete_tombstones(tx: sqlite3.Connection, *, before_ns: int) -> None:
    """Forget tombstones that are older."""
    tx.execute("DELETE FROM tombstones WHERE removed_at_ns < ?", (before_ns,))


def journal_seq(tx: sqlite3.Connection) -> int | None:
    """Sequence number of the last event that was dealt with; None before the first."""
    found = tx.execute("SELECT value FROM meta WHERE key = ?", (_JOURNAL_SEQ,)).fetchone()
    return None if found is None else int(found[0])


def set_journal_seq(tx: sqlite3.Connection, seq: int) -> None:
    """Record how far the journal was dealt with, in the transaction that deals with it."""
    tx.execute(
        "INSERT INTO meta (key, value) VALUES (?, ?) "
        "ON CONFLICT (key) DO UPDATE SET value = excluded.value",
        (_JOURNAL_SEQ, str(seq)),
    )


def _container(row: sqlite3.Row) -> ContainerRow:
    return ContainerRow(
        row["id"], row["name"], row["state"], row["image_id"], json.loads(row["record"])
    )


def _exec(row: sqlite3.Row) -> ExecRow:
    return ExecRow(row["id"], row["container_id"], json.loads(row["record"]))


def _dump(value: Mapping[str, Any]) -> str:
    return json.dumps(value, separators=(",", ":"))
