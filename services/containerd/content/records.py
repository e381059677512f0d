"""Rows of the database as the store gives them out, and as filters see them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from services.containerd.content.store import ContentInfo
from services.containerd.filters import map_field

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Sequence


def info_of(row: sqlite3.Row) -> ContentInfo:
    """What a row of ``content`` says."""
    return ContentInfo(
        digest=row["digest"],
        size_bytes=row["size_bytes"],
        labels=json.loads(row["labels"]),
        created_at_ns=row["created_at_ns"],
        updated_at_ns=row["updated_at_ns"],
    )


def fields_of(info: ContentInfo) -> Callable[[Sequence[str]], str | None]:
    """The fields of a blob that a filter can name."""

    def value(path: Sequence[str]) -> str | None:
        if path[0] == "digest":
            return info.digest
        return map_field(info.labels, path[1:]) if path[0] == "labels" else None

    return value


def ingest_fields_of(row: sqlite3.Row) -> Callable[[Sequence[str]], str | None]:
    """The fields of an ingest that a filter can name."""
    return lambda path: str(row["ref"]) if path[0] == "ref" else None
