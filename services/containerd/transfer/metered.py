"""Transfers that are counted and timed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.containerd.transfer.transfers import Transfers

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence
    from contextlib import AbstractContextManager

    from services.containerd.content.descriptor import Platform
    from services.containerd.content.store import ContentStore
    from services.containerd.images.store import Image, ImageStore
    from services.containerd.leases.lease import Leases
    from services.containerd.remotes.remote import Remote
    from services.containerd.transfer.destination import Destination
    from services.containerd.transfer.load import Loader
    from services.containerd.transfer.progress import Report
    from services.containerd.transfer.pull import Puller
    from services.containerd.transfer.push import Pusher


class MeteredTransfers(Transfers):
    """Otherwise as :class:`Transfers`.

    Args:
        content: as there.
        images: as there.
        leases: as there.
        puller: as there.
        loader: as there.
        pusher: as there.
        timed: entered with the kind of a transfer, and left at its end, however that is.
    """

    def __init__(
        self,
        content: ContentStore,
        images: ImageStore,
        leases: Leases,
        *,
        puller: Puller,
        loader: Loader,
        pusher: Pusher,
        timed: Callable[[str], AbstractContextManager[None]],
    ) -> None:
        super().__init__(content, images, leases, puller=puller, loader=loader, pusher=pusher)
        self._timed = timed

    async def pull(
        self, namespace: str, remote: Remote, destination: Destination, report: Report
    ) -> list[Image]:
        """See :meth:`Transfers.pull`."""
        with self._timed("pull"):
            return await super().pull(namespace, remote, destination, report)

    async def load(
        self,
        namespace: str,
        source: AsyncIterator[bytes],
        destination: Destination,
        report: Report,
        *,
        compress: bool = False,
    ) -> list[Image]:
        """See :meth:`Transfers.load`."""
        with self._timed("load"):
            return await super().load(namespace, source, destination, report, compress=compress)

    async def push(
        self,
        namespace: str,
        name: str,
        remote: Remote,
        report: Report,
        *,
        platforms: Sequence[Platform] = (),
    ) -> None:
        """See :meth:`Transfers.push`."""
        with self._timed("push"):
            await super().push(namespace, name, remote, report, platforms=platforms)
