"""What transfers ask of others, beside the stores, the leases and the registries."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Protocol

from services.common.frozen import frozen

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from services.containerd.content.descriptor import Descriptor
    from services.containerd.transfer.progress import ProgressTracker


@frozen
class UnpackLayer:
    """A layer and the digest of what is inside."""

    descriptor: Descriptor
    diff_id: str


class Unpacker(Protocol):
    """Makes snapshots of layers."""

    def check(self, snapshotter: str) -> str:
        """The name of the snapshotter to use; the default one if ``snapshotter`` is empty.

        Raises:
            InvalidArgument: there is none of that name.
        """

    async def unpack(
        self,
        namespace: str,
        layers: Sequence[UnpackLayer],
        *,
        snapshotter: str,
        tracker: ProgressTracker,
        arrived: Callable[[Descriptor], Awaitable[None]],
    ) -> str:
        """Make a committed snapshot of each layer, named by its chain id, on the one below.

        Those that exist already are left alone. Each layer's blob is labelled with its diff id.

        Args:
            namespace: whose.
            layers: lowest first.
            snapshotter: as ``check`` returned it.
            tracker: is told.
            arrived: returns when the blob of a layer is in the content store.

        Returns:
            The chain id of the topmost layer; empty if there are no layers.

        Raises:
            DataLoss: a layer's content is not what its diff id says.
            TheseusError: whatever the snapshotter or the applier raises.
        """


@asynccontextmanager
async def first_error() -> AsyncIterator[None]:
    """Raise, of a task group's errors inside the block, the first one alone.

    The others came with it, or of it: a client wants one sentence.
    """
    try:
        yield
    except BaseExceptionGroup as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise error from error.__cause__
