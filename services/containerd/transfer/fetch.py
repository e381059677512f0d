"""One blob from a registry into the content store, however many want it at once."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from services.common.errors import AlreadyExists, DataLoss, NotFound, Unavailable
from services.containerd.content.labels import DISTRIBUTION_SOURCE
from services.containerd.images.media_types import ref_key
from services.containerd.keyed_lock import KeyedLock
from services.containerd.transfer.resumption import INTERRUPTIONS
from services.containerd.uninterrupted import uninterrupted

if TYPE_CHECKING:
    from services.containerd.content.descriptor import Descriptor
    from services.containerd.content.store import ContentStore, ContentWriter
    from services.containerd.remotes.remote import Remote
    from services.containerd.transfer.progress import ProgressTracker

_REF_WAIT_S = 60.0
_REF_POLL_S = 0.1


class BlobFetcher:
    """Fetches blobs: each once, and not more than ``max_downloads`` at a time in all."""

    def __init__(self, content: ContentStore, *, max_downloads: int) -> None:
        self._content = content
        self._downloads = asyncio.Semaphore(max_downloads)
        self._locks: KeyedLock[str] = KeyedLock()
        self._writing: set[tuple[str, str]] = set()

    async def fetch(
        self, namespace: str, remote: Remote, descriptor: Descriptor, tracker: ProgressTracker
    ) -> None:
        """Have a blob in the content store, verified and on the disk.

        Raises:
            DataLoss: the registry sends other bytes than the descriptor names.
            TheseusError: as :class:`Remote` and :class:`ContentStore` say.
        """
        tracker.add(descriptor)
        async with self._locks.hold(descriptor.digest):
            try:
                writer = await self._open(namespace, descriptor)
            except AlreadyExists:
                tracker.exists(descriptor)
                await self._add_source(namespace, remote, descriptor)
                return
            key = namespace, ref_key(descriptor.media_type, descriptor.digest)
            self._writing.add(key)
            async with writer:
                try:
                    await self._fill(namespace, remote, descriptor, writer, tracker)
                    await self._commit(remote, descriptor, writer, tracker)
                except INTERRUPTIONS:
                    # A crash leaves the same: an ingest that the next pull goes on from.
                    if not writer.offset_bytes:
                        await uninterrupted(self._abort(*key))
                    raise
                except BaseException:
                    await uninterrupted(self._abort(*key))
                    raise
                finally:
                    self._writing.discard(key)

    async def discard(self, namespace: str, ref: str) -> None:
        """Throw away what an interrupted fetch has left; one that is under way is left alone."""
        if (namespace, ref) not in self._writing:
            await self._abort(namespace, ref)

    async def _commit(
        self,
        remote: Remote,
        descriptor: Descriptor,
        writer: ContentWriter,
        tracker: ProgressTracker,
    ) -> None:
        try:
            await writer.commit(
                size_bytes=descriptor.size_bytes,
                expected=descriptor.digest,
                labels=_source(remote, ""),
                media_type=descriptor.media_type,
            )
        except AlreadyExists:
            tracker.exists(descriptor)
        else:
            tracker.completed(descriptor)

    async def _abort(self, namespace: str, ref: str) -> None:
        with suppress(NotFound):
            await self._content.abort(namespace, ref)

    async def _open(self, namespace: str, descriptor: Descriptor) -> ContentWriter:
        ref = ref_key(descriptor.media_type, descriptor.digest)
        deadline_s = time.monotonic() + _REF_WAIT_S
        while True:
            try:
                return await self._content.writer(
                    namespace, ref, total_bytes=descriptor.size_bytes, expected=descriptor.digest
                )
            except Unavailable:  # a client writes to that ref itself
                if time.monotonic() > deadline_s:
                    raise
                await asyncio.sleep(_REF_POLL_S)

    async def _fill(
        self,
        namespace: str,
        remote: Remote,
        descriptor: Descriptor,
        writer: ContentWriter,
        tracker: ProgressTracker,
    ) -> None:
        resumed = writer.offset_bytes > 0
        if writer.offset_bytes > descriptor.size_bytes:
            await writer.truncate()
        async with self._downloads:
            tracker.moves(descriptor, lambda: writer.offset_bytes)
            await remote.fetch(descriptor, writer)
            if writer.digest != descriptor.digest and resumed:
                # What an earlier process left was damaged, by a power cut for instance.
                await writer.truncate()
                await remote.fetch(descriptor, writer)
        if writer.digest != descriptor.digest:
            raise DataLoss(
                f"{remote.reference.domain} sent wrong bytes for {descriptor.digest}: "
                f"their digest is {writer.digest}"
            )

    async def _add_source(self, namespace: str, remote: Remote, descriptor: Descriptor) -> None:
        key = DISTRIBUTION_SOURCE + remote.reference.domain
        known = (await self._content.info(namespace, descriptor.digest)).labels.get(key, "")
        if remote.reference.path not in known.split(","):
            await self._content.update(
                namespace, descriptor.digest, _source(remote, known), [f"labels.{key}"]
            )


def _source(remote: Remote, known: str) -> dict[str, str]:
    """The label that says which repositories of a registry have a blob."""
    repositories = [*filter(None, known.split(",")), remote.reference.path]
    return {DISTRIBUTION_SOURCE + remote.reference.domain: ",".join(repositories)[-2000:]}
