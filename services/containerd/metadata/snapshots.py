"""Rows of ``snapshots``. Every function takes the transaction first.

A row's id names its directory. Ids are handed out by the snapshotter, not by SQLite, because the
directory is made before the row.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from services.common.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
)
from services.common.frozen import frozen

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Mapping

VIEW = 1
ACTIVE = 2
COMMITTED = 3

_SELECT = """
SELECT s.id, s.key, s.kind, coalesce(p.key, '') AS parent, s.parent_id, s.inodes, s.size_bytes,
       s.labels, s.created_at_ns, s.updated_at_ns, s.namespace, s.backend,
       coalesce(p.backend, '') AS parent_backend
FROM snapshots AS s LEFT JOIN snapshots AS p ON p.id = s.parent_id
"""


@frozen
class Space:
    """Where a key is looked up: one snapshotter's snapshots in one namespace."""

    snapshotter: str
    namespace: str


@frozen
class SnapshotRow:
    """A row, with the parent's key beside its id; ``parent_id`` is None on nothing.

    ``backend`` is what the snapshot is called by the service that keeps it, if one does.
    """

    id: int
    namespace: str
    key: str
    kind: int
    parent: str
    parent_id: int | None
    inodes: int
    size_bytes: int
    labels: dict[str, str]
    created_at_ns: int
    updated_at_ns: int
    backend: str
    parent_backend: str


def get(tx: sqlite3.Connection, space: Space, key: str) -> SnapshotRow:
    """The row of a key.

    Raises:
        NotFound: there is none.
    """
    row = tx.execute(
        _SELECT + "WHERE s.snapshotter = ? AND s.namespace = ? AND s.key = ?",
        (space.snapshotter, space.namespace, key),
    ).fetchone()
    if row is None:
        raise NotFound(f"snapshot {key!r} does not exist", resource=("snapshot", key))
    return _from_row(row)


def get_by_id(tx: sqlite3.Connection, snapshot_id: int) -> SnapshotRow:
    """The row of an id, which exists."""
    return _from_row(tx.execute(_SELECT + "WHERE s.id = ?", (snapshot_id,)).fetchone())


def list_all(tx: sqlite3.Connection, space: Space) -> list[SnapshotRow]:
    """Every row of a space, by age, which puts a parent before its children."""
    rows = tx.execute(
        _SELECT + "WHERE s.snapshotter = ? AND s.namespace = ? ORDER BY s.created_at_ns, s.id",
        (space.snapshotter, space.namespace),
    )
    return [_from_row(row) for row in rows]


def all_of(tx: sqlite3.Connection, snapshotter: str) -> list[SnapshotRow]:
    """Every row of a snapshotter in all namespaces, a parent before its children."""
    rows = tx.execute(
        """
        WITH RECURSIVE chain (id, depth) AS (
            SELECT id, 0 FROM snapshots WHERE parent_id IS NULL
            UNION ALL
            SELECT s.id, chain.depth + 1 FROM snapshots AS s JOIN chain ON s.parent_id = chain.id
        )
        """
        + _SELECT
        + "JOIN chain ON chain.id = s.id WHERE s.snapshotter = ? ORDER BY chain.depth, s.id",
        (snapshotter,),
    )
    return [_from_row(row) for row in rows]


def kinds(tx: sqlite3.Connection, snapshotter: str) -> dict[int, int]:
    """Kind of every snapshot of a snapshotter, in all namespaces, by its id."""
    rows = tx.execute("SELECT id, kind FROM snapshots WHERE snapshotter = ?", (snapshotter,))
    return {int(row["id"]): int(row["kind"]) for row in rows}


def highest_id(tx: sqlite3.Connection) -> int:
    """The highest id that any snapshot has, or once had; 0 before the first."""
    row = tx.execute(
        "SELECT max(coalesce((SELECT max(id) FROM snapshots), 0),"
        " coalesce((SELECT seq FROM sqlite_sequence WHERE name = 'snapshots'), 0))"
    ).fetchone()
    return int(row[0])


def ancestors(tx: sqlite3.Connection, snapshot_id: int) -> list[int]:
    """Ids of what a snapshot stands on, nearest first; its own is not among them."""
    rows = tx.execute(
        """
        WITH RECURSIVE chain (id, parent_id, depth) AS (
            SELECT id, parent_id, 0 FROM snapshots WHERE id = ?
            UNION ALL
            SELECT s.id, s.parent_id, chain.depth + 1
            FROM snapshots AS s JOIN chain ON s.id = chain.parent_id
        )
        SELECT id FROM chain WHERE depth > 0 ORDER BY depth
        """,
        (snapshot_id,),
    )
    return [int(row["id"]) for row in rows]


def insert(
    tx: sqlite3.Connection,
    space: Space,
    key: str,
    *,
    snapshot_id: int,
    kind: int,
    parent: str,
    labels: Mapping[str, str],
    backend: str = "",
    now_ns: int,
) -> None:
    """Record a new snapshot, of any kind.

    Raises:
        AlreadyExists: the key is taken.
        NotFound: there is no such parent.
        InvalidArgument: the parent is not committed.
    """
    require_free(tx, space, key)
    parent_id = None
    if parent:
        row = get_parent(tx, space, parent)
        parent_id = row.id
    tx.execute(
        "INSERT INTO snapshots (id, snapshotter, namespace, key, parent_id, kind, labels,"
        " backend, created_at_ns, updated_at_ns) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            snapshot_id,
            space.snapshotter,
            space.namespace,
            key,
            parent_id,
            kind,
            json.dumps(dict(labels)),
            backend,
            now_ns,
            now_ns,
        ),
    )


def get_parent(tx: sqlite3.Connection, space: Space, parent: str) -> SnapshotRow:
    """The row of a snapshot that others are to stand on.

    Raises:
        NotFound: there is none.
        InvalidArgument: it is not committed.
    """
    try:
        row = get(tx, space, parent)
    except NotFound as error:
        raise NotFound(
            f"parent snapshot {parent!r} does not exist", resource=("snapshot", parent)
        ) from error
    if row.kind != COMMITTED:
        raise InvalidArgument(f"parent snapshot {parent!r} is not committed", field="parent")
    return row


def exists(tx: sqlite3.Connection, space: Space, key: str) -> bool:
    """Whether a key is taken."""
    found = tx.execute(
        "SELECT 1 FROM snapshots WHERE snapshotter = ? AND namespace = ? AND key = ?",
        (space.snapshotter, space.namespace, key),
    ).fetchone()
    return found is not None


def require_free(tx: sqlite3.Connection, space: Space, key: str) -> None:
    """Raise ``AlreadyExists`` if a key is taken."""
    if exists(tx, space, key):
        raise AlreadyExists(f"snapshot {key!r} already exists", resource=("snapshot", key))


def require_committable(
    tx: sqlite3.Connection, space: Space, key: str, *, name: str, parent: str
) -> tuple[SnapshotRow, int | None]:
    """The row of ``key`` if it can be committed as ``name``, and the parent's id from then on.

    Raises:
        AlreadyExists: the name is taken.
        NotFound: there is no such key, or no such parent.
        FailedPrecondition: the snapshot is not active, or the new parent is not committed.
        InvalidArgument: the snapshot has another parent.
    """
    require_free(tx, space, name)
    row = get(tx, space, key)
    if row.kind != ACTIVE:
        raise FailedPrecondition(f"snapshot {key!r} is not active, and cannot be committed")
    if not parent or parent == row.parent:
        return row, row.parent_id
    if row.parent:
        raise InvalidArgument(
            f"snapshot {key!r} stands on {row.parent!r} and cannot move to {parent!r}",
            field="parent",
        )
    try:
        return row, get_parent(tx, space, parent).id
    except InvalidArgument as error:
        raise FailedPrecondition(error.message) from error


def commit(
    tx: sqlite3.Connection,
    space: Space,
    key: str,
    *,
    name: str,
    parent: str,
    labels: Mapping[str, str],
    inodes: int,
    size_bytes: int,
    backend: str = "",
    now_ns: int,
) -> None:
    """Turn an active snapshot into a committed one; raises as ``require_committable``."""
    row, parent_id = require_committable(tx, space, key, name=name, parent=parent)
    tx.execute(
        "UPDATE snapshots SET key = ?, kind = ?, parent_id = ?, labels = ?, inodes = ?,"
        " size_bytes = ?, backend = ?, created_at_ns = ?, updated_at_ns = ? WHERE id = ?",
        (
            name,
            COMMITTED,
            parent_id,
            json.dumps(dict(labels)),
            inodes,
            size_bytes,
            backend,
            now_ns,
            now_ns,
            row.id,
        ),
    )


def set_usage(tx: sqlite3.Connection, snapshot_id: int, *, inodes: int, size_bytes: int) -> None:
    """Record what a committed snapshot takes."""
    tx.execute(
        "UPDATE snapshots SET inodes = ?, size_bytes = ? WHERE id = ?",
        (inodes, size_bytes, snapshot_id),
    )


def set_labels(
    tx: sqlite3.Connection, snapshot_id: int, labels: Mapping[str, str], *, now_ns: int
) -> None:
    """Replace the labels of a snapshot."""
    tx.execute(
        "UPDATE snapshots SET labels = ?, updated_at_ns = ? WHERE id = ?",
        (json.dumps(dict(labels)), now_ns, snapshot_id),
    )


def delete(tx: sqlite3.Connection, space: Space, key: str) -> SnapshotRow:
    """Forget a snapshot; returns its row, whose files are rubbish from the commit on.

    Raises:
        NotFound: there is none.
        FailedPrecondition: others stand on it.
    """
    row = get(tx, space, key)
    child = tx.execute(
        "SELECT key FROM snapshots WHERE parent_id = ? LIMIT 1", (row.id,)
    ).fetchone()
    if child is not None:
        raise FailedPrecondition(
            f"snapshot {key!r} cannot be removed: snapshot {child['key']!r} stands on it"
        )
    tx.execute("DELETE FROM snapshots WHERE id = ?", (row.id,))
    return row


def _from_row(row: sqlite3.Row) -> SnapshotRow:
    return SnapshotRow(
        id=row["id"],
        namespace=row["namespace"],
        key=row["key"],
        kind=row["kind"],
        parent=row["parent"],
        parent_id=row["parent_id"],
        inodes=row["inodes"],
        size_bytes=row["size_bytes"],
        labels=json.loads(row["labels"]),
        created_at_ns=row["created_at_ns"],
        updated_at_ns=row["updated_at_ns"],
        backend=row["backend"],
        parent_backend=row["parent_backend"],
    )
