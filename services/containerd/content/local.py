"""Blobs and ingests as files, with their rows in the database.

    <root>/content/blobs/<algorithm>/<hex>     complete, verified, read-only, on the disk
    <root>/content/ingest/<id>/data            a write under way; <id> is in the row of its ref

Crash order. A file exists before its row and outlives it:

* opening an ingest: make its directory, then write its row;
* commit: fsync the data, rename it into ``blobs``, fsync that directory, then, in one transaction,
  write the rows of the blob and drop the row of the ingest; last, remove the ingest's directory;
* delete and abort: drop the rows, then remove the files.

So whatever a crash leaves is a file or a directory without a row, or the row of an ingest whose
data was renamed; ``reconcile`` finds those at the start. It must run before the first writer.

Rename, row and removal of one blob happen under that digest's lock, or a commit in one namespace
could rely on the file that a delete in another is about to remove.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import structlog

from services.common.disk import NO_FLOOR
from services.common.errors import (
    InvalidArgument,
    OutOfRange,
    ResourceExhausted,
    Unavailable,
)
from services.containerd.content.digest import split_digest
from services.containerd.content.files import install, unlink
from services.containerd.content.ingest import IngestFile
from services.containerd.content.labels import changed_labels, checked_labels
from services.containerd.content.reconcile import Leftovers, find_leftovers
from services.containerd.content.records import (
    blob_exists,
    fields_of,
    info_of,
    ingest_fields_of,
    no_blob,
    no_ingest,
)
from services.containerd.content.store import (
    CHUNK_BYTES,
    MANIFEST_MAX_BYTES,
    ContentInfo,
    IngestStatus,
)
from services.containerd.content.writer import LocalWriter, Publication
from services.containerd.filters import parse
from services.containerd.gc.mutations import UNHEARD
from services.containerd.keyed_lock import KeyedLock
from services.containerd.leases.lease import CONTENT, INGESTS, add_resource, current_lease
from services.containerd.metadata import content as rows
from services.containerd.metadata.leases import remove_resource
from services.containerd.uninterrupted import uninterrupted

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
    from pathlib import Path
    from typing import Any

    from services.common.database import Database
    from services.common.disk import DiskFloor
    from services.containerd.events.sink import EventSink
    from services.containerd.gc.lock import GcLock
    from services.containerd.gc.mutations import Mutations

log = structlog.get_logger(__name__)


class LocalContentStore:
    """The content store of a node. See :class:`ContentStore` for the contract.

    Args:
        root: containerd's root; the files lie in ``content`` below it.
        db: the open database.
        events: where what happens to blobs is told.
        gc_lock: held shared around each pair of file and row.
        mutations: told of every change.
        floor: how much room data has to leave on the disk.
        trace: called with the name of each step that a crash may follow, for tests.
    """

    def __init__(
        self,
        root: Path,
        db: Database,
        *,
        events: EventSink,
        gc_lock: GcLock,
        mutations: Mutations = UNHEARD,
        floor: DiskFloor = NO_FLOOR,
        trace: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._blobs = root / "content" / "blobs"
        self._ingests = root / "content" / "ingest"
        self._db = db
        self._events = events
        self._gc_lock = gc_lock
        self._mutations = mutations
        self._floor = floor
        self._trace = trace
        self._blob_locks: KeyedLock[str] = KeyedLock()
        # The refs that are taken; None while the writer is being opened.
        self._writers: dict[tuple[str, str], LocalWriter | None] = {}
        for directory in (self._blobs, self._ingests):
            directory.mkdir(parents=True, exist_ok=True, mode=0o711)

    async def info(self, namespace: str, digest: str) -> ContentInfo:
        """See :class:`ContentReader`."""
        split_digest(digest)
        row = self._db.look(lambda tx: rows.get(tx, namespace, digest))
        if row is None:
            raise no_blob(namespace, digest)
        return info_of(row)

    async def find(self, namespace: str, filters: Sequence[str] = ()) -> list[ContentInfo]:
        """See :class:`ContentStore`."""
        wanted = parse(filters)
        found = await self._db.read(lambda tx: rows.list_all(tx, namespace))
        return [info for info in map(info_of, found) if wanted.matches(fields_of(info))]

    async def update(
        self, namespace: str, digest: str, labels: Mapping[str, str], fields: Sequence[str] = ()
    ) -> ContentInfo:
        """See :class:`ContentStore`."""
        split_digest(digest)

        def change(tx: sqlite3.Connection) -> ContentInfo:
            row = rows.get(tx, namespace, digest)
            if row is None:
                raise no_blob(namespace, digest)
            new = changed_labels(info_of(row).labels, labels, fields)
            rows.set_labels(tx, namespace, digest, new, now_ns=time.time_ns())
            changed = rows.get(tx, namespace, digest)
            assert changed is not None, "a row that was just written is there"
            return info_of(changed)

        changed = await self._db.write(change)
        self._mutations.changed()
        return changed

    async def delete(self, namespace: str, digest: str) -> None:
        """See :class:`ContentStore`."""
        split_digest(digest)
        lease = current_lease.get()

        def forget(tx: sqlite3.Connection) -> None:
            if not rows.delete(tx, namespace, digest):
                raise no_blob(namespace, digest)
            remove_resource(tx, namespace, lease, CONTENT, digest)
            self._events.append(
                tx,
                namespace,
                "/content/delete",
                "containerd.events.ContentDelete",
                {"digest": digest},
            )

        async with self._gc_lock.shared():
            await self._db.write(forget)
            self._mutations.deleted()
            await uninterrupted(self.release([digest]))

    async def release(self, digests: Iterable[str]) -> int:
        """Remove the files of blobs that no namespace has any more; for the collector.

        It takes rows of ``content`` away in its own transaction, then calls this, holding its lock.

        Returns:
            How many bytes became free.
        """

        async def release_one(digest: str) -> int:
            async with self._blob_locks.hold(digest):
                return await self._release(digest)

        # All at once, so that their transactions are committed in groups.
        return sum(await asyncio.gather(*map(release_one, digests)))

    async def path(self, namespace: str, digest: str) -> Path:
        """See :class:`ContentReader`."""
        await self.info(namespace, digest)
        return self._blob_path(digest)

    async def read(
        self, namespace: str, digest: str, *, max_bytes: int = MANIFEST_MAX_BYTES
    ) -> bytes:
        """See :class:`ContentReader`."""
        info = await self.info(namespace, digest)
        if info.size_bytes > max_bytes:
            raise ResourceExhausted(
                f"blob {digest} has {info.size_bytes} bytes, more than the {max_bytes} that are "
                "read at once"
            )
        try:
            return await asyncio.to_thread(self._blob_path(digest).read_bytes)
        except FileNotFoundError as error:
            raise no_blob(namespace, digest) from error

    async def chunks(
        self, namespace: str, digest: str, *, offset: int = 0, size_bytes: int = 0
    ) -> AsyncIterator[bytes]:
        """See :class:`ContentReader`."""
        info = await self.info(namespace, digest)
        if offset < 0 or offset > info.size_bytes:
            raise OutOfRange(f"offset {offset} of blob {digest} lies past its {info.size_bytes}")
        end = min(info.size_bytes, offset + size_bytes) if size_bytes > 0 else info.size_bytes
        try:
            fd = await asyncio.to_thread(
                os.open, self._blob_path(digest), os.O_RDONLY | os.O_CLOEXEC
            )
        except FileNotFoundError as error:
            raise no_blob(namespace, digest) from error
        try:
            while offset < end:
                data = await asyncio.to_thread(os.pread, fd, min(CHUNK_BYTES, end - offset), offset)
                if not data:
                    break
                offset += len(data)
                yield data
        finally:
            os.close(fd)

    async def writer(
        self, namespace: str, ref: str, *, total_bytes: int = 0, expected: str = ""
    ) -> LocalWriter:
        """See :class:`ContentStore`."""
        if not ref:
            raise InvalidArgument("the ref of a write must not be empty", field="ref")
        if expected:
            split_digest(expected, field="expected")
        if (namespace, ref) in self._writers:
            raise Unavailable(
                f"ref {ref!r} is locked: another writer has it; wait for that one, or abort it",
                retry_after_s=0.1,
            )
        self._writers[namespace, ref] = None
        try:
            async with self._gc_lock.shared():
                writer = await uninterrupted(
                    self._open(namespace, ref, total_bytes=total_bytes, expected=expected)
                )
        except BaseException:
            del self._writers[namespace, ref]
            raise
        self._writers[namespace, ref] = writer
        return writer

    async def status(self, namespace: str, ref: str) -> IngestStatus:
        """See :class:`ContentStore`."""
        row = await self._db.read(lambda tx: rows.get_ingest(tx, namespace, ref))
        if row is None:
            raise no_ingest(namespace, ref)
        return await asyncio.to_thread(self._status, row)

    async def statuses(self, namespace: str, filters: Sequence[str] = ()) -> list[IngestStatus]:
        """See :class:`ContentStore`."""
        wanted = parse(filters)
        found = await self._db.read(lambda tx: rows.list_ingests(tx, namespace))
        chosen = [row for row in found if wanted.matches(ingest_fields_of(row))]
        return await asyncio.to_thread(lambda: [self._status(row) for row in chosen])

    async def abort(self, namespace: str, ref: str) -> None:
        """See :class:`ContentStore`."""
        async with self._gc_lock.shared():
            await uninterrupted(self._abort(namespace, ref))

    async def reconcile(self) -> Leftovers:
        """Bring files and rows back in step after a crash; returns what was found.

        Nothing may write while this runs.
        """
        blobs, ingests = await self._db.read(lambda tx: (rows.all_blobs(tx), rows.all_ingests(tx)))
        found = await asyncio.to_thread(
            find_leftovers,
            self._blobs,
            self._ingests,
            blobs=[digest for digest, _ in blobs],
            ingests=[(row["namespace"], row["ref"], row["id"]) for row in ingests],
        )

        def forget(tx: sqlite3.Connection) -> None:
            for digest in found.lost_blobs:
                rows.forget_lost_blob(tx, digest)
            for namespace, ref in found.empty_ingests:
                rows.delete_ingest(tx, namespace, ref)

        if found:
            await self._db.write(forget)
            await asyncio.to_thread(found.remove_files)
            log.warning("content reconciled", **found.summary())
        await self.release([digest for digest, used in blobs if not used])
        return found

    # What follows serves LocalWriter.

    async def publish(self, publication: Publication) -> ContentInfo:
        """Make sealed data a blob and record it, as ``commit`` of its writer asks."""
        async with self._gc_lock.shared():
            return await uninterrupted(self._publish(publication))

    def forget_writer(self, namespace: str, ref: str) -> None:
        """Free the ref of a writer that is closed."""
        self._writers.pop((namespace, ref), None)

    async def open_file(self, ingest_id: str, expected: str) -> IngestFile:
        """Open the data file of an ingest."""
        return await asyncio.to_thread(
            IngestFile, self._ingests / ingest_id, expected=expected, floor=self._floor
        )

    async def _open(
        self, namespace: str, ref: str, *, total_bytes: int, expected: str
    ) -> LocalWriter:
        row, have, shared_bytes = await self._db.read(
            lambda tx: (
                rows.get_ingest(tx, namespace, ref),
                rows.get(tx, namespace, expected) if expected else None,
                rows.blob_size(tx, expected) if expected else None,
            )
        )
        if total_bytes > 0 and shared_bytes != total_bytes:
            shared_bytes = None
        ingest_id = secrets.token_hex(16) if row is None else str(row["id"])
        file = None
        if have is None and shared_bytes is None:
            await asyncio.to_thread(self._floor.require, total_bytes)
            algorithm_of = expected or (row["expected"] if row is not None else "")
            file = await self.open_file(ingest_id, algorithm_of)
            self._trace("ingest opened")
        lease = current_lease.get()
        try:
            recorded = await self._db.write(
                lambda tx: _record_ingest(
                    tx,
                    namespace,
                    ref,
                    lease=lease,
                    ingest_id=ingest_id,
                    total_bytes=total_bytes,
                    expected=expected,
                )
            )
        except BaseException:
            if file is not None:
                file.close()
            if row is None:
                await asyncio.to_thread(shutil.rmtree, self._ingests / ingest_id, True)
            raise
        self._mutations.changed()
        if recorded is not None:
            shared_bytes = shared_bytes or 0
            return LocalWriter(self, recorded, file=file, shared_bytes=shared_bytes, lease=lease)
        if file is not None:
            file.close()
        if file is not None or row is not None:
            await self._drop(namespace, ref, ingest_id, "")
        raise blob_exists(namespace, expected)

    async def _publish(self, publication: Publication) -> ContentInfo:
        digest = publication.digest
        async with self._blob_locks.hold(digest):
            known = await self._db.read(lambda tx: rows.blob_size(tx, digest))
            if known is None:
                if publication.data is None:
                    raise Unavailable(
                        f"blob {digest} went away while it was taken over: write it again"
                    )
                await asyncio.to_thread(install, publication.data, self._blob_path(digest))
                self._trace("renamed")
            info = await self._db.write(lambda tx: self._record(tx, publication))
        self._trace("recorded")
        self._mutations.changed()
        await asyncio.to_thread(shutil.rmtree, self._ingests / publication.ingest_id, True)
        if info is None:
            raise blob_exists(publication.namespace, digest)
        return info

    def _record(self, tx: sqlite3.Connection, publication: Publication) -> ContentInfo | None:
        namespace, digest = publication.namespace, publication.digest
        created = rows.insert(
            tx,
            namespace,
            digest,
            size_bytes=publication.size_bytes,
            labels=checked_labels(publication.labels),
            now_ns=time.time_ns(),
        )
        rows.delete_ingest(tx, namespace, publication.ref)
        remove_resource(tx, namespace, publication.lease, INGESTS, publication.ref)
        add_resource(tx, namespace, publication.lease, CONTENT, digest)
        if not created:
            return None
        self._events.append(
            tx,
            namespace,
            "/content/create",
            "containerd.events.ContentCreate",
            {
                "digest": digest,
                "size": publication.size_bytes,
                "mediaType": publication.media_type,
            },
        )
        row = rows.get(tx, namespace, digest)
        assert row is not None, "a row that was just written is there"
        return info_of(row)

    async def _abort(self, namespace: str, ref: str) -> None:
        row = await self._db.read(lambda tx: rows.get_ingest(tx, namespace, ref))
        if row is None:
            raise no_ingest(namespace, ref)
        writer = self._writers.get((namespace, ref))
        if writer is not None:
            await writer.cancel()
        await self._drop(namespace, ref, row["id"], row["expected"])

    async def _drop(self, namespace: str, ref: str, ingest_id: str, expected: str) -> None:
        lease = current_lease.get()

        def forget(tx: sqlite3.Connection) -> None:
            rows.delete_ingest(tx, namespace, ref)
            remove_resource(tx, namespace, lease, INGESTS, ref)

        await self._db.write(forget)
        self._trace("ingest dropped")
        self._mutations.changed()
        await asyncio.to_thread(shutil.rmtree, self._ingests / ingest_id, True)
        if expected:  # the ingest may have been what kept another namespace's blob
            await self.release([expected])

    def _status(self, row: sqlite3.Row) -> IngestStatus:
        writer = self._writers.get((row["namespace"], row["ref"]))
        if writer is not None:
            return writer.status()
        offset, updated_at_ns = 0, row["updated_at_ns"]
        with suppress(FileNotFoundError):
            stat = (self._ingests / row["id"] / "data").stat()
            offset, updated_at_ns = stat.st_size, max(updated_at_ns, stat.st_mtime_ns)
        return IngestStatus(
            ref=row["ref"],
            offset_bytes=offset,
            total_bytes=row["total_bytes"],
            expected=row["expected"],
            started_at_ns=row["started_at_ns"],
            updated_at_ns=updated_at_ns,
        )

    async def _release(self, digest: str) -> int:
        if not await self._db.write(lambda tx: rows.release_blob(tx, digest)):
            return 0
        self._trace("released")
        return await asyncio.to_thread(unlink, self._blob_path(digest))

    def _blob_path(self, digest: str) -> Path:
        algorithm, encoded = split_digest(digest)
        return self._blobs / algorithm / encoded


def _record_ingest(
    tx: sqlite3.Connection,
    namespace: str,
    ref: str,
    *,
    lease: str,
    ingest_id: str,
    total_bytes: int,
    expected: str,
) -> dict[str, Any] | None:
    """The row of an ingest; None if the namespace has what is expected, which is leased then."""
    if expected and rows.get(tx, namespace, expected) is not None:
        add_resource(tx, namespace, lease, CONTENT, expected)
        return None
    add_resource(tx, namespace, lease, INGESTS, ref)
    return rows.put_ingest(
        tx,
        namespace,
        ref,
        ingest_id=ingest_id,
        total_bytes=total_bytes,
        expected=expected,
        now_ns=time.time_ns(),
    )
