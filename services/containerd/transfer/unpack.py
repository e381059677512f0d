"""Layers into snapshots, through a snapshotter and an applier.

The committed snapshot of a layer is named by its chain id, so images share those of their common
layers. While a layer is unpacked, its snapshot is called ``extract-<random> <chain id>``. Of two
that want the same chain id at once, one unpacks it, and the other one waits and finds it done.

Where snapshots are directories that lie upon each other, a layer does not wait for those below it:
it is unpacked into a directory of its own, which is put on its parent once that is committed. One
that turns out to need what is below is unpacked again, over it. Whoever holds the lock of a chain
id waits for shorter chains only, so that two images cannot wait for each other.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from typing import TYPE_CHECKING

import structlog

from services.common.disk import NO_FLOOR
from services.common.errors import AlreadyExists, DataLoss, NotFound, TheseusError
from services.common.frozen import frozen
from services.common.mounts import Mount
from services.containerd.content.digest import chain_ids
from services.containerd.content.labels import UNCOMPRESSED
from services.containerd.diff.applier import LowerNeeded
from services.containerd.keyed_lock import KeyedLock
from services.containerd.leases.lease import Resource, current_lease, snapshots_type
from services.containerd.snapshots.snapshotter import INHERITED_LABEL_PREFIX, find_configured
from services.containerd.transfer.collaborators import first_error
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
        return find_configured(self._snapshotters, snapshotter or self._default)

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
        chains = chain_ids(layer.diff_id for layer in layers)
        below: _Below | None = None
        async with first_error(), asyncio.TaskGroup() as group:
            for layer, chain_id in zip(layers, chains, strict=True):
                work = _Work(namespace, target, layer, chain_id, below)
                making = self._make(work, arrived, tracker)
                below = _Below(chain_id, group.create_task(making, name=f"unpack {chain_id}"))
        return below.chain_id if below is not None else ""

    async def _make(
        self,
        work: _Work,
        arrived: Callable[[Descriptor], Awaitable[None]],
        tracker: ProgressTracker,
    ) -> None:
        descriptor = work.layer.descriptor
        await arrived(descriptor)
        async with self._locks.hold((work.namespace, work.target.name, work.chain_id)):
            if not await self._exists(work.namespace, work.target, work.chain_id):
                tracker.extracting(descriptor)
                await self._extract(work)
                tracker.extracted(descriptor)
        labels = {UNCOMPRESSED: work.layer.diff_id}
        await add_labels(self._content, work.namespace, descriptor.digest, labels)

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

    async def _extract(self, work: _Work) -> None:
        began = time.monotonic()
        await asyncio.to_thread(self._floor.require)
        below = work.below
        detached = below is not None and work.stacks and not below.task.done()
        if detached:
            try:
                await self._extract_once(work, detached=True)
            except LowerNeeded as error:
                log.info("layer needs those below it", chain_id=work.chain_id, why=error.message)
                detached = False
        if not detached:
            await work.until_below_is_committed()
            await self._extract_once(work, detached=False)
        log.info(
            "layer unpacked",
            digest=work.layer.descriptor.digest,
            chain_id=work.chain_id,
            detached=detached,
            seconds=round(time.monotonic() - began, 3),
        )

    async def _extract_once(self, work: _Work, *, detached: bool) -> None:
        """Unpack a layer over its parent; or by itself, and put it on its parent then."""
        namespace, target, layer = work.namespace, work.target, work.layer
        key = f"extract-{secrets.token_hex(6)} {work.chain_id}"
        labels = {
            name: value
            for name, value in layer.descriptor.annotations.items()
            if name.startswith(INHERITED_LABEL_PREFIX)
        }
        labels[SNAPSHOT_REF] = work.chain_id
        parent = "" if detached else work.parent
        try:
            mounts = await target.prepare(namespace, key, parent, labels)
        except AlreadyExists:  # by a client, or by a snapshotter that knows layers by itself
            return
        try:
            self._trace("layer prepared")
            if detached:
                mounts = _upper_alone(mounts)
            result = await self._applier.apply(
                namespace, layer.descriptor, mounts, detached=detached
            )
            self._trace("layer applied")
            if result.digest != layer.diff_id:
                raise DataLoss(
                    f"layer {layer.descriptor.digest} has the wrong content: its diff id is "
                    f"{result.digest}, the image's configuration says {layer.diff_id}"
                )
            await work.until_below_is_committed()
            await target.commit(namespace, work.chain_id, key, labels, parent=work.parent)
            self._trace("layer committed")
        except AlreadyExists:  # a client has unpacked the same layer meanwhile
            await self._abandon(namespace, target, key)
        except BaseException:
            await self._abandon(namespace, target, key)
            raise

    async def _abandon(self, namespace: str, target: Snapshotter, key: str) -> None:
        try:
            await uninterrupted(target.remove(namespace, key))
        except TheseusError as error:  # the lease's end leaves it to the collector
            log.warning("unpacked snapshot is left behind", key=key, error=error.message)


def _upper_alone(mounts: Sequence[Mount]) -> list[Mount]:
    """The directory of a snapshot on nothing, as the upper one of an overlay."""
    if len(mounts) != 1 or mounts[0].type != "bind":
        raise LowerNeeded("the snapshotter gives no directory for a layer by itself")
    return [Mount("overlay", "overlay", options=(f"upperdir={mounts[0].source}",))]


@frozen
class _Below:
    """The layer below one: its chain id, and who makes its snapshot."""

    chain_id: str
    task: asyncio.Task[None]


@frozen
class _Work:
    """One layer to unpack."""

    namespace: str
    target: Snapshotter
    layer: UnpackLayer
    chain_id: str
    below: _Below | None

    @property
    def parent(self) -> str:
        """The chain id of the layer below; empty: there is none."""
        return self.below.chain_id if self.below is not None else ""

    @property
    def stacks(self) -> bool:
        """Whether a directory that was filled by itself can be put on others."""
        return "rebase" in self.target.capabilities

    async def until_below_is_committed(self) -> None:
        """Returns when the snapshot to stand on is there; raises what became of it otherwise."""
        if self.below is not None:
            await asyncio.shield(self.below.task)
