"""What a content store is: blobs by digest, labels per namespace, and resumable writes.

A **blob** is immutable and named by the digest of its bytes, so two namespaces that have the same
one share its file; each sees only the blobs that were committed in it, with its own labels.

An **ingest** is a write under way, named by a **ref** that the writer chooses. One writer holds a
ref at a time. An ingest outlives its writer and the process: opened again, it goes on where its
data ends. ``commit`` makes it a blob, ``abort`` throws it away.

    writer(ref) ──▶ ingest ──── commit ──▶ blob ──── delete ──▶ gone from this namespace
                      │ close: kept, for another writer(ref)    (its file, from the last one)
                      └ abort: gone

Whoever writes for longer than a moment does it under a lease, or the collector may take what is
not referenced yet. Nothing here keeps a blob alive by itself.
"""

from __future__ import annotations

from dataclasses import field
from typing import TYPE_CHECKING, Protocol

from services.common.frozen import frozen

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence
    from pathlib import Path
    from types import TracebackType
    from typing import Self

CHUNK_BYTES = 1 << 20
"""What is read, hashed or written by one trip to a thread."""

MANIFEST_MAX_BYTES = 4 << 20
"""Largest JSON document (index, manifest, configuration) that is read into memory."""


@frozen
class ContentInfo:
    """What is recorded of a blob in one namespace."""

    digest: str
    size_bytes: int
    labels: Mapping[str, str] = field(default_factory=dict)
    created_at_ns: int = 0
    updated_at_ns: int = 0


@frozen
class IngestStatus:
    """How far a write has come. ``total_bytes`` is 0 and ``expected`` empty if not known."""

    ref: str
    offset_bytes: int
    total_bytes: int
    expected: str
    started_at_ns: int
    updated_at_ns: int


class ContentWriter(Protocol):
    """The one writer of an ingest. Its methods are called one after another."""

    @property
    def offset_bytes(self) -> int:
        """How many bytes there are; where the next ``write`` goes."""

    @property
    def digest(self) -> str:
        """Digest of what has been written so far."""

    def status(self) -> IngestStatus:
        """How far the write has come."""

    async def write(self, data: bytes) -> None:
        """Append ``data``. Calls with about ``CHUNK_BYTES`` are the fastest.

        Raises:
            FailedPrecondition: the writer is closed, or the ingest was aborted.
            ResourceExhausted: the disk is full.
        """

    async def truncate(self) -> None:
        """Throw away what has been written and begin again at 0."""

    async def commit(
        self,
        *,
        size_bytes: int = 0,
        expected: str = "",
        labels: Mapping[str, str] | None = None,
        media_type: str = "",
    ) -> ContentInfo:
        """Make what was written a blob of the namespace. The writer is closed afterwards.

        Args:
            size_bytes: what the size must be; 0: any, or what the writer was opened with.
            expected: what the digest must be; empty: any, or what the writer was opened with.
            labels: the blob's labels in this namespace.
            media_type: for the event.

        Raises:
            FailedPrecondition: size or digest differ; the ingest is kept.
            AlreadyExists: the namespace has that blob; the ingest is gone.
        """

    async def close(self) -> None:
        """Let go of the ref, and keep the ingest unless it was committed. Idempotent."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...


class ContentReader(Protocol):
    """Reading blobs: the part of a store that most of its users need."""

    async def info(self, namespace: str, digest: str) -> ContentInfo:
        """What is recorded of a blob.

        Raises:
            InvalidArgument: that is no digest.
            NotFound: the namespace has no such blob.
        """

    async def path(self, namespace: str, digest: str) -> Path:
        """The file that holds a blob, for reading only.

        A file that is open stays readable when the blob is deleted.

        Raises:
            InvalidArgument: that is no digest.
            NotFound: the namespace has no such blob.
        """

    async def read(
        self, namespace: str, digest: str, *, max_bytes: int = MANIFEST_MAX_BYTES
    ) -> bytes:
        """A whole blob, which must be small.

        Raises:
            NotFound: the namespace has no such blob.
            ResourceExhausted: it is larger than ``max_bytes``.
        """

    def chunks(
        self, namespace: str, digest: str, *, offset: int = 0, size_bytes: int = 0
    ) -> AsyncIterator[bytes]:
        """A range of a blob in pieces of ``CHUNK_BYTES``.

        Args:
            namespace: whose.
            digest: which.
            offset: where to begin.
            size_bytes: how many bytes at most; 0: to the end.

        Raises:
            NotFound: the namespace has no such blob.
            OutOfRange: the offset lies past the end.
        """


class ContentStore(ContentReader, Protocol):
    """Keeps blobs and ingests. Every method is safe to call concurrently."""

    async def find(self, namespace: str, filters: Sequence[str] = ()) -> list[ContentInfo]:
        """Blobs that match any of the filters, by digest; all if there are none.

        Raises:
            InvalidArgument: a filter does not parse.
        """

    async def update(
        self, namespace: str, digest: str, labels: Mapping[str, str], fields: Sequence[str] = ()
    ) -> ContentInfo:
        """Change a blob's labels, the only part that can change.

        Args:
            namespace: whose.
            digest: which.
            labels: the new values.
            fields: field mask paths: ``labels`` replaces all, ``labels.<name>`` sets that one (and
                removes it where ``labels`` lacks it or has it empty). Empty replaces all.

        Raises:
            NotFound: the namespace has no such blob.
            InvalidArgument: a path names something else, or a label is too long.
        """

    async def delete(self, namespace: str, digest: str) -> None:
        """Take a blob from the namespace; its file goes with the last namespace that has it.

        Raises:
            NotFound: the namespace has no such blob.
        """

    async def writer(
        self, namespace: str, ref: str, *, total_bytes: int = 0, expected: str = ""
    ) -> ContentWriter:
        """Begin an ingest, or go on with the one of that ref.

        A blob that another namespace has already arrives complete: its writer's offset is the size.

        Args:
            namespace: whose.
            ref: the name of the ingest.
            total_bytes: the size, if known.
            expected: the digest, if known; its algorithm is the one that is computed.

        Raises:
            InvalidArgument: the ref is empty, or ``expected`` is no digest.
            AlreadyExists: the namespace has the blob ``expected``.
            Unavailable: somebody else writes to that ref now.
        """

    async def status(self, namespace: str, ref: str) -> IngestStatus:
        """How far an ingest has come.

        Raises:
            NotFound: there is none of that ref.
        """

    async def statuses(self, namespace: str, filters: Sequence[str] = ()) -> list[IngestStatus]:
        """Ingests that match any of the filters, by ref; all if there are none.

        Raises:
            InvalidArgument: a filter does not parse.
        """

    async def abort(self, namespace: str, ref: str) -> None:
        """Throw an ingest away; a writer that still holds it fails with its next call.

        Raises:
            NotFound: there is none of that ref.
        """
