"""Every transfer that there is, behind one door."""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.common.errors import InvalidArgument, NotFound
from services.containerd.images.archive_writer import ArchiveWriter
from services.containerd.transfer.destination import begins_with, record
from services.containerd.transfer.progress import Progress

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Sequence

    from services.containerd.content.descriptor import Platform
    from services.containerd.content.store import ContentStore
    from services.containerd.images.archive_writer import ExportOptions
    from services.containerd.images.store import Image, ImageStore
    from services.containerd.leases.lease import Leases
    from services.containerd.remotes.remote import Remote
    from services.containerd.transfer.destination import Destination, ExtraName
    from services.containerd.transfer.load import Loader
    from services.containerd.transfer.progress import Report
    from services.containerd.transfer.pull import Puller
    from services.containerd.transfer.push import Pusher


class Transfers:
    """Moves images. Each method works under a lease, and raises what its parts raise.

    Args:
        content: where blobs are.
        images: where names are.
        leases: keep the collector away meanwhile.
        puller: from registries.
        loader: from archives.
        pusher: to registries.
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
    ) -> None:
        self._images = images
        self._leases = leases
        self._puller = puller
        self._loader = loader
        self._pusher = pusher
        self._writer = ArchiveWriter(content)

    async def pull(
        self, namespace: str, remote: Remote, destination: Destination, report: Report
    ) -> list[Image]:
        """See :meth:`Puller.pull`."""
        return await self._puller.pull(namespace, remote, destination, report)

    async def load(
        self,
        namespace: str,
        source: AsyncIterator[bytes],
        destination: Destination,
        report: Report,
        *,
        compress: bool = False,
    ) -> list[Image]:
        """See :meth:`Loader.load`."""
        return await self._loader.load(namespace, source, destination, report, compress=compress)

    async def push(
        self,
        namespace: str,
        name: str,
        remote: Remote,
        report: Report,
        *,
        platforms: Sequence[Platform] = (),
    ) -> None:
        """See :meth:`Pusher.push`."""
        await self._pusher.push(namespace, name, remote, report, platforms=platforms)

    async def export(
        self,
        namespace: str,
        name: str,
        extra_names: Sequence[ExtraName],
        options: ExportOptions,
        report: Report,
    ) -> AsyncGenerator[bytes, None]:
        """An archive of the images of these names, each once; a prefix stands for all below it.

        Raises:
            NotFound: one of them is not there, or a part of it, or nothing has the prefix.
            InvalidArgument: there are no names.
        """
        report(Progress("Exporting"))
        async with self._leases.hold(namespace):
            found = [await self._images.get(namespace, name)] if name else []
            for extra in extra_names:
                if extra.is_prefix:
                    found += await self._below(namespace, extra.name)
                else:
                    found.append(await self._images.get(namespace, extra.name))
            if not found:
                raise InvalidArgument("no image was named to export", field="source.name")
            pairs = list({image.name: (image.name, image.target) for image in found}.values())
            async for piece in self._writer.save(namespace, pairs, options):
                yield piece
        report(Progress("Completed export"))

    async def _below(self, namespace: str, prefix: str) -> list[Image]:
        """The images whose names begin with ``prefix``, up to a whole part."""
        images = await self._images.find(namespace)
        found = [image for image in images if begins_with(image.name, prefix.rstrip("/"))]
        if not found:
            raise NotFound(
                f"no image has a name that begins with {prefix!r}", resource=("image", prefix)
            )
        return found

    async def tag(self, namespace: str, name: str, destination: Destination) -> list[Image]:
        """Give an image further names.

        Raises:
            NotFound: there is no such image, or no name to give.
        """
        async with self._leases.hold(namespace):
            target = (await self._images.get(namespace, name)).target
            return await record(self._images, namespace, destination.images(target))
