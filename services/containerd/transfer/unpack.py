"""Layers into snapshots, through a snapshotter and an applier.

The committed snapshot of a layer is named by its chain id, so images share those of their common
layers. While a layer is unpacked, its snapshot is called ``extract-<random> <chain id>``. Of two
that want the same chain id at once, one unpacks it, and the other one waits and finds it done.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from typing import TYPE_CHECKING

import structlog

from services.common.disk import NO_FLOOR
from services.common.errors import AlreadyExists, DataLoss, InvalidArgument, NotFound, TheseusError
from services.containerd.content.digest import chain_ids
from services.containerd.content.labels import UNCOMPRESSED
from services.containerd.keyed_lock import KeyedLock
from services.containerd.leases.lease import Resource, current_lease, snapshots_type
from services.containerd.snapshots.snapshotter import INHERITED_LABEL_PREFIX
from services.containerd.transfer.labelling import add_labels
from services.containerd.uninterrupted import uninterrupted

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from services.common.disk import DiskFloor
    from services.containerd.content.descriptor import Descriptor
    from services.containerd.content.store import ContentStore
    from services.containerd.diff.applier import Applier
    from services.containerd.leases.lease import Leases
    from services.containerd.snapshots.snapshotter import Snapshotter
    from services.containerd.transfer.collaborators import UnpackLayer
    from services.containerd.transfer.progress import ProgressTracker

log = structlog.get_logger(__name__)

SNAPSHOT_REF = "containerd.io/snapshot.ref"
"""On a snapshot made of a layer: its chain id."""


class LayerUnpacker:
    """Implements :class:`Unpacker`.

    Args:
        content: where the blobs are, and get their labels.
        snapshotters: by name.
        applier: unpacks one layer.
        leases: keep snapshots that were there already from the collector.
        default: the snapshotter of requests that name none.
        floor: how much room layers have to leave.
        trace: called with the name of each step that a crash may follow, for tests.
    """

    def __init__(
        self,
        content: ContentStore,
        snapshotters: Mapping[str, Snapshotter],
        applier: Applier,
        leases: Leases,
        *,
        default: str,
        floor: DiskFloor = NO_FLOOR,
        trace: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._content = content
        self._snapshotters = snapshotters
        self._applier = applier
        self._leases = leases
        self._default = default
        self._floor = floor
        self._trace = trace
        self._locks: KeyedLock[tuple[str, str, str]] = KeyedLock()

    def check(self, snapshotter: str) -> str:
        """See :class:`Unpacker`."""
        name = snapshotter or self._default
        if name not in self._snapshotters:
            raise InvalidArgument(
                f"snapshotter {name!r} is not configured: there are "
                f"{', '.join(sorted(self._snapshotters))}",
                field="snapshotter",
            )
        return name

    async def unpack(
        self,
        namespace: str,
        layers: Sequence[UnpackLayer],
        *,
        snapshotter: str,
        tracker: ProgressTracker,
        arrived: Callable[[Descriptor], Awaitable[None]],
    ) -> str:
        """See :class:`Unpacker`."""
        target = self._snapshotters[snapshotter]
        parent = ""
        for layer, chain_id in zip(
            layers, chain_ids(layer.diff_id for layer in layers), strict=True
        ):
            await arrived(layer.descriptor)
            async with self._locks.hold((namespace, snapshotter, chain_id)):
                if not await self._exists(namespace, target, chain_id):
                    tracker.extracting(layer.descriptor)
                    await self._extract(namespace, target, layer, chain_id, parent)
                    tracker.extracted(layer.descriptor)
            labels = {UNCOMPRESSED: layer.diff_id}
            await add_labels(self._content, namespace, layer.descriptor.digest, labels)
            parent = chain_id
        return parent

    async def _exists(self, namespace: str, target: Snapshotter, chain_id: str) -> bool:
        # Under the lease before it is looked for, or the collector could take it in between.
        if lease := current_lease.get():
            await self._leases.add(
                namespace, lease, Resource(snapshots_type(target.name), chain_id)
            )
        try:
            await target.stat(namespace, chain_id)
        except NotFound:
            return False
        return True

    async def _extract(
        self, namespace: str, target: Snapshotter, layer: UnpackLayer, chain_id: str, parent: str
    ) -> None:
        began = time.monotonic()
        await asyncio.to_thread(self._floor.require)
        key = f"extract-{secrets.token_hex(6)} {chain_id}"
        labels = {
            name: value
            for name, value in layer.descriptor.annotations.items()
            if name.startswith(INHERITED_LABEL_PREFIX)
        }
        labels[SNAPSHOT_REF] = chain_id
        try:
            mounts = await target.prepare(namespace, key, parent, labels)
        except AlreadyExists:  # by a client, or by a snapshotter that knows layers by itself
            return
        try:
            self._trace("layer prepared")
            result = await self._applier.apply(namespace, layer.descriptor, mounts)
            self._trace("layer applied")
            if result.digest != layer.diff_id:
                raise DataLoss(
                    f"layer {layer.descriptor.digest} has the wrong content: its diff id is "
                    f"{result.digest}, the image's configuration says {layer.diff_id}"
                )
            await target.commit(namespace, chain_id, key, labels)
            self._trace("layer committed")
        except AlreadyExists:  # a client has unpacked the same layer meanwhile
            await self._abandon(namespace, target, key)
        except BaseException:
            await self._abandon(namespace, target, key)
            raise
        log.info(
            "layer unpacked",
            digest=layer.descriptor.digest,
            chain_id=chain_id,
            seconds=round(time.monotonic() - began, 3),
        )

    async def _abandon(self, namespace: str, target: Snapshotter, key: str) -> None:
        try:
            await uninterrupted(target.remove(namespace, key))
        except TheseusError as error:  # the lease's end leaves it to the collector
            log.warning("unpacked snapshot is left behind", key=key, error=error.message)
