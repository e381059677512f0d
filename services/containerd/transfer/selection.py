"""What of an image is transferred: a walk from its top to its configurations.

On the way, what refers to something gets the labels that keep it alive.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from services.common.errors import NotFound
from services.common.frozen import frozen
from services.containerd.images.manifest import (
    ImageConfig,
    MalformedManifest,
    not_an_image,
    parse_config,
)
from services.containerd.images.media_types import (
    OCTET_STREAM,
    is_config,
    is_index,
    is_layer,
    is_manifest,
    is_schema_1,
)
from services.containerd.images.tree import check_nesting, child_labels, children
from services.containerd.transfer.collaborators import UnpackLayer, first_error
from services.containerd.transfer.labelling import add_labels

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from services.containerd.content.descriptor import Descriptor, Platform
    from services.containerd.content.store import ContentStore
    from services.containerd.transfer.destination import Destination
    from services.containerd.transfer.progress import ProgressTracker


@frozen
class SelectedImage:
    """One manifest that is transferred with its layers.

    Attributes:
        manifest: where the manifest is.
        config: where the configuration is.
        platform: what it is for; None if it is no image of a file system.
        layers: with their diff ids, lowest first; without, if it is none.
        others: blobs that are transferred and not unpacked.
    """

    manifest: Descriptor
    config: Descriptor
    platform: Platform | None
    layers: tuple[UnpackLayer, ...]
    others: tuple[Descriptor, ...]


class ImageTree:
    """Walks an image from its top to its configurations, and labels what refers to something.

    Args:
        content: the store.
        namespace: whose.
        destination: which branches.
        tracker: is told.
        obtain: has a blob in the store when it returns; raises NotFound where there is none.
        partial: pass over manifests of an index that are not there, as long as some are.
    """

    def __init__(
        self,
        content: ContentStore,
        namespace: str,
        destination: Destination,
        tracker: ProgressTracker,
        obtain: Callable[[Descriptor], Awaitable[None]],
        *,
        partial: bool = False,
    ) -> None:
        self._content = content
        self._namespace = namespace
        self._destination = destination
        self._tracker = tracker
        self._obtain = obtain
        self._partial = partial

    async def select(self, target: Descriptor) -> list[SelectedImage]:
        """The images to transfer, best first; their documents are in the store afterwards.

        Raises:
            NotFound: none is for the platforms that are wanted.
            MalformedManifest: something on the way does not parse.
        """
        async with first_error():
            return await self._visit(target, with_layers=True, above=())

    async def _visit(
        self, descriptor: Descriptor, *, with_layers: bool, above: tuple[str, ...]
    ) -> list[SelectedImage]:
        if not (is_index(descriptor.media_type) or is_manifest(descriptor.media_type)):
            if not above or is_schema_1(descriptor.media_type):
                raise not_an_image(descriptor)
            await self._obtain(descriptor)  # an index may list what is no image
            return []
        await self._obtain(descriptor)
        below = await children(self._content, self._namespace, descriptor)
        await self._label(descriptor, below)
        self._tracker.add_children(descriptor, below)
        if is_manifest(descriptor.media_type):
            return await self._visit_manifest(descriptor, below, with_layers=with_layers)
        above = check_nesting(descriptor, above)
        chosen = self._destination.select(descriptor, below)
        if self._partial:
            chosen = await self._present(chosen)
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(
                    self._visit(child, with_layers=with_layers and layers, above=above)
                )
                for child, layers in chosen
            ]
        return [image for task in tasks for image in task.result()]

    async def _present(
        self, chosen: list[tuple[Descriptor, bool]]
    ) -> list[tuple[Descriptor, bool]]:
        present = []
        missing: NotFound | None = None
        for child, with_layers in chosen:
            try:
                await self._obtain(child)
            except NotFound as error:
                missing = error
            else:
                present.append((child, with_layers))
        if missing is not None and not present:
            raise missing
        return present

    async def _visit_manifest(
        self, manifest: Descriptor, below: Sequence[Descriptor], *, with_layers: bool
    ) -> list[SelectedImage]:
        config, *rest = below
        await self._obtain(config)
        if not with_layers:
            return []
        parsed = await self._config(config)
        layers = [blob for blob in rest if is_layer(blob.media_type)]
        others = tuple(blob for blob in rest if not is_layer(blob.media_type))
        if parsed is None:
            return [SelectedImage(manifest, config, None, (), (*layers, *others))]
        if len(layers) != len(parsed.diff_ids):
            unknown = "".join(f", and one of unknown media type {o.media_type}" for o in others)
            raise MalformedManifest(
                f"the manifest has {len(layers)} layers{unknown}; its configuration "
                f"{config.digest} has {len(parsed.diff_ids)} diff ids"
            )
        pairs = tuple(map(UnpackLayer, layers, parsed.diff_ids))
        return [SelectedImage(manifest, config, parsed.platform, pairs, others)]

    async def _config(self, config: Descriptor) -> ImageConfig | None:
        if not is_config(config.media_type) and config.media_type != OCTET_STREAM:
            return None
        return parse_config(await self._content.read(self._namespace, config.digest))

    async def _label(self, descriptor: Descriptor, below: Sequence[Descriptor]) -> None:
        await add_labels(self._content, self._namespace, descriptor.digest, child_labels(below))
