"""What an applier is: it unpacks a layer's blob into a snapshot's mounts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from services.common.errors import FailedPrecondition

if TYPE_CHECKING:
    from collections.abc import Sequence

    from services.common.mounts import Mount
    from services.containerd.content.descriptor import Descriptor


class LowerNeeded(FailedPrecondition):
    """A layer cannot be unpacked without those below it: unpack it over them."""


class Applier(Protocol):
    """Unpacks layers. Safe to call concurrently; how many run at once is the implementation's."""

    async def apply(
        self,
        namespace: str,
        descriptor: Descriptor,
        mounts: Sequence[Mount],
        *,
        sync: bool = False,
        detached: bool = False,
    ) -> Descriptor:
        """Unpack the blob that ``descriptor`` names over what ``mounts`` show.

        Nothing of the layer lands outside the mounts, whatever names and links it has: each name is
        resolved as if the mounts' root were ``/``. A failure leaves a part of the layer there; the
        caller removes the snapshot. The data is not on the disk yet unless ``sync`` is set: that is
        what ``commit`` of the snapshot does.

        With ``detached`` the mounts are an overlay that has its upper directory alone, because the
        layers below are not there yet. What comes out is the same as over them, or an error.

        Returns:
            The uncompressed layer: its media type is that of a plain tar, its digest (the *diff
            id*) and size are those of the whole uncompressed stream.

        Raises:
            NotFound: the namespace has no such blob.
            Unimplemented: the media type is not one of a layer.
            InvalidArgument: the tar asks for what cannot be: a link to nothing, an unknown entry.
            DataLoss: the blob is cut short, or its compression or tar is broken.
            ResourceExhausted: the layer passes a limit, or the disk is full.
            Internal: the worker that unpacks died.
            LowerNeeded: the layer has something whose parent directory, or the other name of a hard
                link, is in a layer below; with ``detached`` only.
        """
