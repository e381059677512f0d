"""The writer of an ingest in the local store."""

from __future__ import annotations

import asyncio
import time
from dataclasses import field
from typing import TYPE_CHECKING

from services.common.errors import FailedPrecondition
from services.common.frozen import frozen
from services.containerd.content.digest import split_digest
from services.containerd.content.store import IngestStatus
from services.containerd.uninterrupted import uninterrupted

if TYPE_CHECKING:
    from collections.abc import Coroutine, Mapping
    from pathlib import Path
    from types import TracebackType
    from typing import Any, Protocol, Self

    from services.containerd.content.ingest import IngestFile
    from services.containerd.content.store import ContentInfo

    class Publisher(Protocol):
        """What a writer asks of the store that made it."""

        async def publish(self, publication: Publication) -> ContentInfo:
            """Make sealed data a blob of its namespace, and record it."""

        def open_file(self, ingest_id: str, expected: str) -> Coroutine[Any, Any, IngestFile]:
            """Open the data file of an ingest."""

        def forget_writer(self, namespace: str, ref: str) -> None:
            """Free the ref of a writer that is closed."""


@frozen
class Publication:
    """A verified ingest on its way to become a blob.

    Attributes:
        namespace: whose.
        ref: of the ingest.
        ingest_id: directory of the ingest.
        data: the sealed file; None if the blob's file is there already.
        digest: computed from the data, never merely claimed.
        size_bytes: likewise.
        labels: for the row.
        media_type: for the event.
        lease: what the blob goes under; empty: none.
    """

    namespace: str
    ref: str
    ingest_id: str
    data: Path | None
    digest: str
    size_bytes: int
    labels: Mapping[str, str] = field(default_factory=dict)
    media_type: str = ""
    lease: str = ""


class LocalWriter:
    """See :class:`ContentWriter` for the contract.

    It has a file, or, when another namespace has the blob, only that one's size: writing begins
    with ``truncate`` then, which makes a file.
    """

    def __init__(
        self,
        store: Publisher,
        row: Mapping[str, Any],
        *,
        file: IngestFile | None,
        shared_bytes: int,
        lease: str,
    ) -> None:
        self._store = store
        self._row = row
        self._file = file
        self._shared_bytes = shared_bytes
        self._lease = lease
        self._updated_at_ns: int = row["updated_at_ns"]
        self._closed = ""  # why nothing can be written any more
        self._busy = asyncio.Lock()  # one trip to a thread at a time, and none behind a close

    @property
    def offset_bytes(self) -> int:
        """See :class:`ContentWriter`."""
        return self._shared_bytes if self._file is None else self._file.size_bytes

    @property
    def digest(self) -> str:
        """See :class:`ContentWriter`."""
        return str(self._row["expected"]) if self._file is None else self._file.digest

    def status(self) -> IngestStatus:
        """See :class:`ContentWriter`."""
        return IngestStatus(
            ref=self._row["ref"],
            offset_bytes=self.offset_bytes,
            total_bytes=self._row["total_bytes"],
            expected=self._row["expected"],
            started_at_ns=self._row["started_at_ns"],
            updated_at_ns=self._updated_at_ns,
        )

    async def write(self, data: bytes) -> None:
        """See :class:`ContentWriter`."""
        async with self._busy:
            self._check_open()
            if self._file is None:
                raise FailedPrecondition(
                    f"blob {self.digest} is complete: commit it, or truncate to write it anew"
                )
            await uninterrupted(asyncio.to_thread(self._file.append, data))
            self._updated_at_ns = time.time_ns()

    async def truncate(self) -> None:
        """See :class:`ContentWriter`."""
        async with self._busy:
            self._check_open()
            if self._file is None:
                self._file = await uninterrupted(
                    self._store.open_file(self._row["id"], self._row["expected"])
                )
            await uninterrupted(asyncio.to_thread(self._file.truncate))

    async def commit(
        self,
        *,
        size_bytes: int = 0,
        expected: str = "",
        labels: Mapping[str, str] | None = None,
        media_type: str = "",
    ) -> ContentInfo:
        """See :class:`ContentWriter`."""
        try:
            async with self._busy:
                self._check_open()
                size_bytes = size_bytes or self._row["total_bytes"]
                if size_bytes not in (0, self.offset_bytes):
                    raise FailedPrecondition(
                        f"unexpected commit size {self.offset_bytes}, expected {size_bytes}"
                    )
                digest = await self._verify(expected or self._row["expected"])
                publication = Publication(
                    namespace=self._row["namespace"],
                    ref=self._row["ref"],
                    ingest_id=self._row["id"],
                    data=None if self._file is None else self._file.path,
                    digest=digest,
                    size_bytes=self.offset_bytes,
                    labels=labels or {},
                    media_type=media_type,
                    lease=self._lease,
                )
                if self._file is not None:
                    await uninterrupted(asyncio.to_thread(self._file.seal))
                return await self._store.publish(publication)
        finally:
            await self.close()

    async def close(self) -> None:
        """See :class:`ContentWriter`."""
        await self._close("the writer is closed")

    async def cancel(self) -> None:
        """Close it because the ingest is thrown away."""
        await self._close("the ingest was aborted")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def _close(self, reason: str) -> None:
        if self._closed:
            return
        self._closed = reason
        async with self._busy:
            if self._file is not None:
                self._file.close()
        self._store.forget_writer(self._row["namespace"], self._row["ref"])

    async def _verify(self, expected: str) -> str:
        if self._file is None:
            digest = self.digest
        elif expected:
            split_digest(expected, field="expected")
            digest = await uninterrupted(asyncio.to_thread(self._file.digest_as, expected))
        else:
            digest = self._file.digest
        if expected and digest != expected:
            raise FailedPrecondition(f"unexpected commit digest {digest}, expected {expected}")
        return digest

    def _check_open(self) -> None:
        if self._closed:
            raise FailedPrecondition(f"cannot write to ref {self._row['ref']!r}: {self._closed}")
