"""Records of sandboxes as rows of the database."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from services.common.errors import AlreadyExists, InvalidArgument, NotFound
from services.containerd.content.labels import checked_labels
from services.containerd.filters import map_field, parse
from services.containerd.identifiers import checked_identifier
from services.containerd.metadata import sandboxes as rows
from services.containerd.sandboxes.store import Sandbox
from services.containerd.typed import (
    NO_VALUE,
    from_columns,
    from_json,
    to_columns,
    to_plain,
)

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Sequence

    from services.common.database import Database

_CHANGEABLE = ("labels", "extensions", "spec", "runtime")


class LocalSandboxStore:
    """The sandbox records of a node. See :class:`SandboxStore` for the contract.

    Args:
        db: the open database.
    """

    def __init__(self, db: Database) -> None:
        self._db = db

    async def get(self, namespace: str, sandbox_id: str) -> Sandbox:
        """See :class:`SandboxStore`."""
        return await self._db.read(lambda tx: _require(tx, namespace, sandbox_id))

    async def find(self, namespace: str, filters: Sequence[str] = ()) -> list[Sandbox]:
        """See :class:`SandboxStore`."""
        wanted = parse(filters)
        found = await self._db.read(lambda tx: rows.list_all(tx, namespace))
        return [item for item in map(_from_row, found) if wanted.matches(_fields(item))]

    async def create(self, namespace: str, sandbox: Sandbox) -> Sandbox:
        """See :class:`SandboxStore`."""
        now_ns = time.time_ns()
        new = _checked(replace(sandbox, created_at_ns=now_ns, updated_at_ns=now_ns))

        def record(tx: sqlite3.Connection) -> None:
            if rows.get(tx, namespace, new.id) is not None:
                raise AlreadyExists(
                    f"sandbox {new.id!r} exists already", resource=("sandbox", new.id)
                )
            _put(tx, namespace, new)

        await self._db.write(record)
        return new

    async def update(self, namespace: str, sandbox: Sandbox, fields: Sequence[str] = ()) -> Sandbox:
        """See :class:`SandboxStore`."""

        def change(tx: sqlite3.Connection) -> Sandbox:
            old = _require(tx, namespace, sandbox.id)
            if not fields and old.runtime_name != sandbox.runtime_name:
                raise InvalidArgument(
                    f"runtime.name of sandbox {old.id!r} is {old.runtime_name!r} and cannot become "
                    f"{sandbox.runtime_name!r}",
                    field="sandbox.runtime.name",
                )
            new = _masked(old, sandbox, fields or _CHANGEABLE)
            new = _checked(replace(new, updated_at_ns=time.time_ns()))
            _put(tx, namespace, new)
            return new

        return await self._db.write(change)

    async def delete(self, namespace: str, sandbox_id: str) -> None:
        """See :class:`SandboxStore`."""

        def forget(tx: sqlite3.Connection) -> None:
            if not rows.delete(tx, namespace, sandbox_id):
                raise _not_found(namespace, sandbox_id)

        await self._db.write(forget)


def _not_found(namespace: str, sandbox_id: str) -> NotFound:
    return NotFound(
        f"sandbox {sandbox_id!r} does not exist in namespace {namespace!r}",
        resource=("sandbox", sandbox_id),
    )


def _require(tx: sqlite3.Connection, namespace: str, sandbox_id: str) -> Sandbox:
    row = rows.get(tx, namespace, sandbox_id)
    if row is None:
        raise _not_found(namespace, sandbox_id)
    return _from_row(row)


def _masked(old: Sandbox, new: Sandbox, fields: Sequence[str]) -> Sandbox:
    result = old
    for path in fields:
        name, separator, key = path.partition(".")
        if separator and name == "labels":
            labels = {**result.labels, key: new.labels.get(key, "")}
            result = replace(result, labels=labels)
        elif separator and name == "extensions":
            extensions = {**result.extensions, key: new.extensions.get(key, NO_VALUE)}
            result = replace(result, extensions=extensions)
        elif path == "runtime":
            result = replace(
                result, runtime_name=new.runtime_name, runtime_options=new.runtime_options
            )
        elif path == "labels":
            result = replace(result, labels=new.labels)
        elif path == "extensions":
            result = replace(result, extensions=new.extensions)
        elif path == "spec":
            result = replace(result, spec=new.spec)
        else:
            raise InvalidArgument(
                f"field {path!r} of sandbox {old.id!r} cannot be changed: "
                f"{', '.join(_CHANGEABLE)} can",
                field="fields",
            )
    return result


def _checked(sandbox: Sandbox) -> Sandbox:
    checked_identifier(sandbox.id, what="sandbox id", field="sandbox.sandbox_id")
    if "" in sandbox.extensions:
        raise InvalidArgument(
            f"sandbox {sandbox.id!r} has an extension without a name", field="sandbox.extensions"
        )
    extensions = {name: value for name, value in sandbox.extensions.items() if value != NO_VALUE}
    return replace(sandbox, labels=checked_labels(sandbox.labels), extensions=extensions)


def _fields(sandbox: Sandbox) -> Callable[[Sequence[str]], str | None]:
    def value(path: Sequence[str]) -> str | None:
        if path[0] == "labels":
            return map_field(sandbox.labels, path[1:])
        return sandbox.id if path[0] == "id" else None

    return value


def _put(tx: sqlite3.Connection, namespace: str, sandbox: Sandbox) -> None:
    rows.put(
        tx,
        namespace,
        sandbox.id,
        labels=sandbox.labels,
        runtime_name=sandbox.runtime_name,
        runtime_options=to_columns(sandbox.runtime_options),
        spec=to_columns(sandbox.spec),
        extensions=to_plain(sandbox.extensions),
        sandboxer=sandbox.sandboxer,
        created_at_ns=sandbox.created_at_ns,
        updated_at_ns=sandbox.updated_at_ns,
    )


def _from_row(row: sqlite3.Row) -> Sandbox:
    return Sandbox(
        id=row["id"],
        runtime_name=row["runtime_name"],
        runtime_options=from_columns(row["runtime_options_type"], row["runtime_options"]),
        spec=from_columns(row["spec_type"], row["spec"]),
        labels=json.loads(row["labels"]),
        extensions=from_json(row["extensions"]),
        sandboxer=row["sandboxer"],
        created_at_ns=row["created_at_ns"],
        updated_at_ns=row["updated_at_ns"],
    )
