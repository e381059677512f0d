"""Pushing: an image from the stores to a registry, what it refers to before itself."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from services.containerd.content.labels import DISTRIBUTION_SOURCE
from services.containerd.images.media_types import (
    is_index,
    is_manifest,
    is_non_distributable,
)
from services.containerd.images.platform import ordered
from services.containerd.images.tree import check_nesting, children, find_manifest
from services.containerd.transfer.collaborators import first_error
from services.containerd.transfer.progress import Progress, ProgressTracker

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    from services.containerd.content.descriptor import Descriptor, Platform
    from services.containerd.content.store import ContentReader
    from services.containerd.images.store import ImageStore
    from services.containerd.leases.lease import Leases
    from services.containerd.remotes.remote import Remote
    from services.containerd.transfer.progress import Report


class Pusher:
    """Pushes images.

    Args:
        content: where the blobs are.
        images: where the names are.
        leases: keep the collector away meanwhile.
        max_uploads: blobs that are sent at once, in all.
    """

    def __init__(
        self, content: ContentReader, images: ImageStore, leases: Leases, *, max_uploads: int
    ) -> None:
        self._content = content
        self._images = images
        self._leases = leases
        self._uploads = asyncio.Semaphore(max_uploads)

    async def push(
        self,
        namespace: str,
        name: str,
        remote: Remote,
        report: Report,
        *,
        platforms: Sequence[Platform] = (),
    ) -> None:
        """Push an image to what the remote's reference names.

        Args:
            namespace: whose.
            name: of the image here.
            remote: where to; its tag is given to the image there.
            report: is told.
            platforms: push only the manifest that suits best, without the index; empty: all.

        Raises:
            NotFound: there is no such image, or a part of it is missing.
            TheseusError: as :class:`Remote` says.
        """
        target_name = f"OCI Registry ({remote.reference})"
        async with self._leases.hold(namespace):
            target = (await self._images.get(namespace, name)).target
            if platforms and is_index(target.media_type):
                target, _ = await find_manifest(
                    self._content, namespace, target, ordered(platforms)
                )
            report(Progress(f"Pushing to {target_name}"))
            report(Progress("pushing content", name, descriptor=target))
            tracker = ProgressTracker(report, name, moving="uploading")
            upload = _Upload(self._content, self._uploads, namespace, remote, tracker)
            async with tracker.running(), first_error():
                await upload.send(target, tag=remote.reference.tag, above=())
        report(Progress("pushed content", name, descriptor=target))
        report(Progress(f"Completed push to {target_name}", descriptor=target))


class _Upload:
    """One image on its way."""

    def __init__(
        self,
        content: ContentReader,
        limit: asyncio.Semaphore,
        namespace: str,
        remote: Remote,
        tracker: ProgressTracker,
    ) -> None:
        self._content = content
        self._limit = limit
        self._namespace = namespace
        self._remote = remote
        self._tracker = tracker
        self._begun: dict[str, asyncio.Task[None]] = {}

    async def send(self, descriptor: Descriptor, *, tag: str, above: tuple[str, ...]) -> None:
        self._tracker.add(descriptor)
        below = await children(self._content, self._namespace, descriptor)
        self._tracker.add_children(descriptor, below)
        if is_index(descriptor.media_type):
            above = check_nesting(descriptor, above)
        async with asyncio.TaskGroup() as group:
            for child in below:
                if is_non_distributable(child.media_type):
                    continue
                group.create_task(self._once(child, above))
        await self._push(descriptor, tag)

    async def _once(self, descriptor: Descriptor, above: tuple[str, ...]) -> None:
        """Two images of an index may share layers: the second one waits for the first."""
        task = self._begun.get(descriptor.digest)
        if task is not None:
            await asyncio.shield(task)
            return
        current = asyncio.current_task()
        assert current is not None, "it is called in tasks only"
        self._begun[descriptor.digest] = current
        await self.send(descriptor, tag="", above=above)

    async def _push(self, descriptor: Descriptor, tag: str) -> None:
        async with self._limit:
            if not tag and await self._remote.has(descriptor):
                self._tracker.exists(descriptor)
                return
            sent = 0

            async def read(offset: int) -> AsyncGenerator[bytes, None]:
                nonlocal sent
                sent = offset
                chunks = self._content.chunks(self._namespace, descriptor.digest, offset=offset)
                async for chunk in chunks:
                    yield chunk
                    sent += len(chunk)

            self._tracker.moves(descriptor, lambda: sent)
            await self._remote.push(
                descriptor, read, mount_from=await self._mount_from(descriptor), tag=tag
            )
            self._tracker.completed(descriptor)

    async def _mount_from(self, descriptor: Descriptor) -> str:
        """A repository of the same registry that the blob came from, or empty."""
        if is_index(descriptor.media_type) or is_manifest(descriptor.media_type):
            return ""
        key = DISTRIBUTION_SOURCE + self._remote.reference.domain
        labels = (await self._content.info(self._namespace, descriptor.digest)).labels
        sources = [path for path in labels.get(key, "").split(",") if path]
        return next((path for path in sources if path != self._remote.reference.path), "")
