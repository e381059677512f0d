"""What a comparer is: it writes what differs between two states of a file tree as a layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from services.common.mounts import Mount
    from services.containerd.content.descriptor import Descriptor


class Comparer(Protocol):
    """Makes layers. Safe to call concurrently."""

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
        """Store, as a blob, the layer that makes ``upper``'s tree of ``lower``'s.

        The same trees give the same bytes. Neither is changed.

        Args:
            namespace: whose content store.
            lower: mounts of the state before; an empty list is an empty tree.
            upper: mounts of the state after.
            media_type: a plain tar, or one compressed with gzip or zstd; empty: OCI's gzip.
            ref: the ingest to write through; empty: one of its own.
            labels: of the blob, beside ``containerd.io/uncompressed``.
            newest_ns: times past this one are set back to it.

        Returns:
            The blob.

        Raises:
            Unimplemented: layers of that media type are not made here.
            FailedPrecondition: the mounts show nothing that can be read.
            Unavailable: somebody else writes to ``ref``.
        """
