"""Loading: images from an archive into the content store, snapshots and the image store."""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.common.errors import NotFound
from services.containerd.images.manifest import parse_index
from services.containerd.images.media_types import is_non_distributable, ref_key
from services.containerd.transfer.destination import record
from services.containerd.transfer.progress import Progress, ProgressTracker
from services.containerd.transfer.selection import ImageTree

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from services.containerd.content.descriptor import Descriptor
    from services.containerd.content.store import ContentStore
    from services.containerd.images.archive import ArchiveReader
    from services.containerd.images.store import Image, ImageStore
    from services.containerd.leases.lease import Leases
    from services.containerd.transfer.destination import Destination
    from services.containerd.transfer.progress import Report
    from services.containerd.transfer.selection import SelectedImage
    from services.containerd.transfer.unpacking import ImageUnpacking

    Obtain = Callable[[Descriptor], Awaitable[None]]


class Loader:
    """Loads archives.

    Args:
        content: where blobs go.
        images: where the records go.
        leases: keep what is not referred to yet.
        reader: reads archives.
        unpacking: makes snapshots.
    """

    def __init__(
        self,
        content: ContentStore,
        images: ImageStore,
        leases: Leases,
        *,
        reader: ArchiveReader,
        unpacking: ImageUnpacking,
    ) -> None:
        self._content = content
        self._images = images
        self._leases = leases
        self._reader = reader
        self._unpacking = unpacking

    async def load(
        self,
        namespace: str,
        source: AsyncIterator[bytes],
        destination: Destination,
        report: Report,
        *,
        compress: bool = False,
    ) -> list[Image]:
        """Load an archive.

        The destination's own name, if it has one, is given to the index of the whole archive; its
        prefixes choose which names in the archive are taken.

        Returns:
            The records that were made.

        Raises:
            NotFound: no image has a name that is taken, or a part of one is missing.
            TheseusError: as :class:`ArchiveReader`, :class:`ImageTree` and :class:`Unpacker` say.
        """
        self._unpacking.check(destination)
        async with self._leases.hold(namespace):
            report(Progress("Importing"))
            index = await self._reader.load(namespace, source, compress=compress)
            tracker = ProgressTracker(report, destination.name)
            async with tracker.running():
                await self._take(namespace, index, destination, tracker)
            wanted = destination.images(index)
            for entry in parse_index(
                await self._content.read(namespace, index.digest), index.media_type
            ):
                if await self._has(namespace, entry):
                    wanted += destination.images_of_entry(entry)
            images = await record(self._images, namespace, wanted)
        for image in images:
            report(Progress("saved", image.name, descriptor=image.target))
        report(Progress("Completed import"))
        return images

    async def _take(
        self,
        namespace: str,
        index: Descriptor,
        destination: Destination,
        tracker: ProgressTracker,
    ) -> None:
        async def obtain(descriptor: Descriptor) -> None:
            if not await self._has(namespace, descriptor):
                raise NotFound(
                    f"the archive has no {ref_key(descriptor.media_type, descriptor.digest)}",
                    resource=("content", descriptor.digest),
                )

        tree = ImageTree(self._content, namespace, destination, tracker, obtain, partial=True)
        selected = await tree.select(index)
        for image in selected:
            await self._check(image, obtain)
        for image, snapshotter in self._unpacking.plan(destination, selected):
            await self._unpacking.unpack(
                namespace, image, snapshotter, tracker=tracker, arrived=obtain
            )

    async def _check(self, image: SelectedImage, obtain: Obtain) -> None:
        for blob in (*(layer.descriptor for layer in image.layers), *image.others):
            if not is_non_distributable(blob.media_type):
                await obtain(blob)

    async def _has(self, namespace: str, descriptor: Descriptor) -> bool:
        try:
            await self._content.info(namespace, descriptor.digest)
        except NotFound:
            return False
        return True
