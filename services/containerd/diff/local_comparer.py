"""The comparer of a node: layers made by worker processes, kept in its own content store."""

from __future__ import annotations

import asyncio
import tempfile
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from services.common.errors import AlreadyExists, Unimplemented
from services.containerd.content.descriptor import Descriptor
from services.containerd.content.labels import UNCOMPRESSED
from services.containerd.content.store import CHUNK_BYTES
from services.containerd.diff.media_types import OCI_GZIP
from services.containerd.diff.pack import COMPRESSORS
from services.containerd.uninterrupted import uninterrupted

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from services.common.mounts import Mount
    from services.containerd.content.store import ContentInfo, ContentStore
    from services.containerd.diff.pool import WorkerPool


class LocalComparer:
    """Makes layers. See :class:`Comparer` for the contract.

    Args:
        content: where the layers go.
        workers: who makes them.
        scratch: a directory for layers on their way, and for mounts.
    """

    def __init__(self, content: ContentStore, workers: WorkerPool, scratch: Path) -> None:
        self._content = content
        self._workers = workers
        self._scratch = scratch

    async def compare(
        self,
        namespace: str,
        lower: Sequence[Mount],
        upper: Sequence[Mount],
        *,
        media_type: str = "",
        ref: str = "",
        labels: Mapping[str, str] | None = None,
        newest_ns: int | None = None,
    ) -> Descriptor:
        """See :class:`Comparer`."""
        media_type = media_type or OCI_GZIP
        if media_type not in COMPRESSORS:
            raise Unimplemented(f"layers of media type {media_type!r} are not made here")
        output = await asyncio.to_thread(self._new_file)
        try:
            made = await self._workers.run(
                "compare",
                lower=list(lower),
                upper=list(upper),
                output=output,
                media_type=media_type,
                newest_ns=newest_ns,
                scratch=self._scratch,
            )
            all_labels = {**(labels or {}), UNCOMPRESSED: made.digest}
            info = await self._store(namespace, output, ref, media_type, all_labels)
        finally:
            await uninterrupted(asyncio.to_thread(output.unlink, missing_ok=True))
        return Descriptor(media_type, info.digest, info.size_bytes)

    async def _store(
        self, namespace: str, file: Path, ref: str, media_type: str, labels: Mapping[str, str]
    ) -> ContentInfo:
        ref = ref or f"layer-{uuid.uuid4().hex}"
        async with await self._content.writer(namespace, ref) as writer:
            if writer.offset_bytes:
                await writer.truncate()
            with await asyncio.to_thread(file.open, "rb") as source:
                while piece := await asyncio.to_thread(source.read, CHUNK_BYTES):
                    await writer.write(piece)
            digest = writer.digest
            try:
                return await writer.commit(labels=labels, media_type=media_type)
            except AlreadyExists:
                fields = [f"labels.{label}" for label in labels]
                return await self._content.update(namespace, digest, labels, fields)

    def _new_file(self) -> Path:
        self._scratch.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.NamedTemporaryFile(prefix="layer-", dir=self._scratch, delete=False) as file:
            return Path(file.name)
