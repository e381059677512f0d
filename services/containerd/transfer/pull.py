"""Pulling: an image from a registry into the content store, snapshots and the image store.

The documents come first (index, manifests, configurations), then all layers, some at once, while
those that have arrived are unpacked from the lowest up. Everything happens under a lease; the
image's record is the last thing to be written, so an image that is there is complete.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from services.containerd.transfer.collaborators import first_error
from services.containerd.transfer.destination import record
from services.containerd.transfer.progress import Progress, ProgressTracker
from services.containerd.transfer.referrers import ReferrersPull
from services.containerd.transfer.resumption import PullLeases
from services.containerd.transfer.selection import ImageTree

if TYPE_CHECKING:
    from services.containerd.content.descriptor import Descriptor
    from services.containerd.content.store import ContentStore
    from services.containerd.images.store import Image, ImageStore
    from services.containerd.leases.lease import Leases
    from services.containerd.remotes.remote import Remote
    from services.containerd.transfer.destination import Destination
    from services.containerd.transfer.fetch import BlobFetcher
    from services.containerd.transfer.progress import Report
    from services.containerd.transfer.unpacking import ImageUnpacking


class Puller:
    """Pulls images.

    Args:
        content: where blobs go.
        images: where the record goes.
        leases: keep what is not referred to yet.
        fetcher: fetches blobs.
        unpacking: makes snapshots.
    """

    def __init__(
        self,
        content: ContentStore,
        images: ImageStore,
        leases: Leases,
        *,
        fetcher: BlobFetcher,
        unpacking: ImageUnpacking,
    ) -> None:
        self._content = content
        self._images = images
        self._leases = PullLeases(leases, fetcher.discard)
        self._fetcher = fetcher
        self._unpacking = unpacking

    async def pull(
        self, namespace: str, remote: Remote, destination: Destination, report: Report
    ) -> list[Image]:
        """Pull what the remote's reference names.

        Returns:
            The records that were made.

        Raises:
            TheseusError: as :class:`Remote`, :class:`ImageTree` and :class:`Unpacker` say. Nothing
                is recorded then; what has arrived serves the next attempt, if there can be one.
        """
        self._unpacking.check(destination)
        source = f"OCI Registry ({remote.reference})"
        async with self._leases.hold(namespace, str(remote.reference)):
            report(Progress(f"Resolving from {source}"))
            target = await remote.resolve()
            report(Progress(f"Pulling from {source}"))
            name = str(remote.reference)
            report(Progress("fetching image content", name, descriptor=target))
            tracker = ProgressTracker(report, name)
            async with tracker.running():
                await self._transfer(namespace, remote, target, destination, tracker)
            images = await record(self._images, namespace, destination.images(target))
        for image in images:
            report(Progress("saved", image.name, descriptor=image.target))
        report(Progress(f"Completed pull from {source}"))
        return images

    async def _transfer(
        self,
        namespace: str,
        remote: Remote,
        target: Descriptor,
        destination: Destination,
        tracker: ProgressTracker,
    ) -> None:
        async def obtain(descriptor: Descriptor) -> None:
            await self._fetcher.fetch(namespace, remote, descriptor, tracker)

        tree = ImageTree(self._content, namespace, destination, tracker, obtain)
        selected = await tree.select(target)
        plan = self._unpacking.plan(destination, selected)
        async with first_error(), asyncio.TaskGroup() as group:
            fetching: dict[str, asyncio.Task[None]] = {}
            for image in selected:
                blobs = (*(layer.descriptor for layer in image.layers), *image.others)
                for blob in blobs:
                    if blob.digest not in fetching:
                        fetching[blob.digest] = group.create_task(obtain(blob))

            if destination.all_metadata:
                referrers = ReferrersPull(
                    self._content, namespace, remote, tracker=tracker, obtain=obtain
                )
                group.create_task(
                    referrers.fetch((target, *(image.manifest for image in selected)))
                )

            async def arrived(descriptor: Descriptor) -> None:
                await asyncio.shield(fetching[descriptor.digest])

            for image, snapshotter in plan:
                group.create_task(
                    self._unpacking.unpack(
                        namespace, image, snapshotter, tracker=tracker, arrived=arrived
                    )
                )
