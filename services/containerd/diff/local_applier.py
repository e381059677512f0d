"""The applier of a node: layers of its own content store, unpacked by worker processes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.common.errors import Unimplemented
from services.containerd.content.descriptor import Descriptor
from services.containerd.diff.media_types import OCI_TAR, is_layer

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from services.common.mounts import Mount
    from services.containerd.content.store import ContentReader
    from services.containerd.diff.pool import WorkerPool


class LocalApplier:
    """Unpacks layers. See :class:`Applier` for the contract.

    Args:
        content: where the blobs are.
        workers: who does it.
        scratch: a directory for mounts that a worker may need for a moment.
    """

    def __init__(self, content: ContentReader, workers: WorkerPool, scratch: Path) -> None:
        self._content = content
        self._workers = workers
        self._scratch = scratch

    async def apply(
        self,
        namespace: str,
        descriptor: Descriptor,
        mounts: Sequence[Mount],
        *,
        sync: bool = False,
        detached: bool = False,
    ) -> Descriptor:
        """See :class:`Applier`."""
        if not is_layer(descriptor.media_type):
            raise Unimplemented(
                f"media type {descriptor.media_type!r} is not one of a layer that can be unpacked"
            )
        blob = await self._content.path(namespace, descriptor.digest)
        result = await self._workers.run(
            "apply",
            blob=blob,
            mounts=list(mounts),
            scratch=self._scratch,
            sync=sync,
            detached=detached,
        )
        return Descriptor(OCI_TAR, result.digest, result.size_bytes)
