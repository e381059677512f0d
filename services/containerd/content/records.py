"""Rows of the database as the store gives them out, as filters see them, or where they are not."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from services.common.errors import AlreadyExists, NotFound
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


def no_blob(namespace: str, digest: str) -> NotFound:
    """That there is no such blob."""
    return NotFound(
        f"content {digest} does not exist in namespace {namespace!r}", resource=("content", digest)
    )


def blob_exists(namespace: str, digest: str) -> AlreadyExists:
    """That the namespace has the blob."""
    return AlreadyExists(
        f"content {digest} exists already in namespace {namespace!r}", resource=("content", digest)
    )


def no_ingest(namespace: str, ref: str) -> NotFound:
    """That there is no such ingest."""
    return NotFound(
        f"no write with ref {ref!r} is under way in namespace {namespace!r}",
        resource=("ingest", ref),
    )
