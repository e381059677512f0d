"""Which of the images that were transferred become snapshots."""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog

from services.common.errors import InvalidArgument
from services.containerd.content.labels import GC_REF_SNAPSHOT
from services.containerd.images.platform import format_platform, ordered, runnable_on
from services.containerd.transfer.labelling import add_labels

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from services.containerd.content.descriptor import Descriptor, Platform
    from services.containerd.content.store import ContentStore
    from services.containerd.transfer.collaborators import Unpacker
    from services.containerd.transfer.destination import Destination
    from services.containerd.transfer.progress import ProgressTracker
    from services.containerd.transfer.selection import SelectedImage

_LAYERS_MAX = 500
"""What overlayfs stacks (OVL_MAX_STACK, fs/overlayfs/params.h)."""

log = structlog.get_logger(__name__)


class ImageUnpacking:
    """Decides which of the selected images become snapshots, and makes those."""

    def __init__(self, content: ContentStore, unpacker: Unpacker, *, host: Platform) -> None:
        self._content = content
        self._unpacker = unpacker
        self._host = runnable_on(host)

    def check(self, destination: Destination) -> None:
        """Refuse what cannot be done, before anything is fetched.

        Raises:
            InvalidArgument: there is no such snapshotter.
        """
        for unpacking in destination.unpackings:
            self._unpacker.check(unpacking.snapshotter)

    def plan(
        self, destination: Destination, images: Sequence[SelectedImage]
    ) -> list[tuple[SelectedImage, str]]:
        """Which image goes into which snapshotter.

        Raises:
            InvalidArgument: one has more layers than can be stacked.
        """
        planned = []
        for unpacking in destination.unpackings:
            matcher = self._host if unpacking.platform is None else ordered([unpacking.platform])
            ranked = [
                (matcher.rank(image.platform), place, image)
                for place, image in enumerate(images)
                if image.platform is not None and self._host.matches(image.platform)
            ]
            matching = [(rank, place, image) for rank, place, image in ranked if rank is not None]
            if not matching:
                log.warning(
                    "nothing to unpack for the platform",
                    wanted=str(matcher),
                    found=[format_platform(image.platform) for image in images if image.platform],
                )
                continue
            best = min(matching, key=lambda entry: entry[:2])[2]
            if len(best.layers) > _LAYERS_MAX:
                raise InvalidArgument(
                    f"the image has {len(best.layers)} layers, and no more than {_LAYERS_MAX} can "
                    "be unpacked: have it built with fewer"
                )
            planned.append((best, self._unpacker.check(unpacking.snapshotter)))
        return planned

    async def unpack(
        self,
        namespace: str,
        image: SelectedImage,
        snapshotter: str,
        *,
        tracker: ProgressTracker,
        arrived: Callable[[Descriptor], Awaitable[None]],
    ) -> None:
        """Make the snapshots of an image, and have its configuration keep them."""
        top = await self._unpacker.unpack(
            namespace, image.layers, snapshotter=snapshotter, tracker=tracker, arrived=arrived
        )
        if top:
            labels = {GC_REF_SNAPSHOT + snapshotter: top}
            await add_labels(self._content, namespace, image.config.digest, labels)
