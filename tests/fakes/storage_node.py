"""All of containerd that keeps images and snapshots, started as a start does it, without gRPC."""

from __future__ import annotations

import asyncio
import os
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from services.common.database import Database
from services.common.errors import NotFound
from services.containerd.check.checker import Checker
from services.containerd.containers.local import LocalContainerStore
from services.containerd.containers.store import Container
from services.containerd.content.descriptor import Descriptor, Platform
from services.containerd.content.local import LocalContentStore
from services.containerd.diff.media_types import OCI_TAR
from services.containerd.diff.unpack import unpack_layer
from services.containerd.events.journal import Journal
from services.containerd.gc.collector import Collector
from services.containerd.gc.lock import GcLock
from services.containerd.gc.mutations import UNHEARD
from services.containerd.images.local import LocalImageStore
from services.containerd.images.reference import parse_reference
from services.containerd.leases.manager import LeaseManager
from services.containerd.metadata import meta
from services.containerd.metadata.schema import MIGRATIONS
from services.containerd.remotes.http import HttpLimits
from services.containerd.remotes.mirrors import DistributionRegistries
from services.containerd.remotes.remote import RegistryAccess
from services.containerd.remotes.retry import RetryPolicy
from services.containerd.rpc.encoding import encode_event
from services.containerd.snapshots.native import NativeSnapshotter
from services.containerd.snapshots.overlay import OverlaySnapshotter
from services.containerd.snapshots.recorded import SnapshotIds
from services.containerd.transfer.destination import Destination, Unpacking
from services.containerd.transfer.fetch import BlobFetcher
from services.containerd.transfer.pull import Puller
from services.containerd.transfer.unpack import LayerUnpacker
from services.containerd.transfer.unpacking import ImageUnpacking
from services.containerd.typed import TypedValue
from tests.fakes.snapshot_collaborators import RecordedEvents, RecordedLeases
from tests.fakes.snapshotters import opened_database

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence
    from pathlib import Path

    from services.common.mounts import Mount
    from services.containerd.snapshots.directories import DirectorySnapshotter

NS = "test"
HOST = Platform("linux", "amd64")


class Applier:
    """Unpacks layers as a worker does, in a thread."""

    def __init__(self, content: LocalContentStore, scratch: Path) -> None:
        self._content = content
        self._scratch = scratch

    async def apply(
        self,
        namespace: str,
        descriptor: Descriptor,
        mounts: Sequence[Mount],
        *,
        sync: bool = False,
        detached: bool = False,
    ) -> Descriptor:
        blob = await self._content.path(namespace, descriptor.digest)
        digest, size = await asyncio.to_thread(
            unpack_layer,
            blob,
            mounts,
            scratch=self._scratch,
            sync=sync,
            detached=detached,
        )
        return Descriptor(OCI_TAR, digest, size)


@dataclass
class StorageNode:
    root: Path
    db: Database
    journal: Journal
    leases: LeaseManager
    content: LocalContentStore
    snapshotters: dict[str, DirectorySnapshotter]
    applier: Applier
    images: LocalImageStore
    containers: LocalContainerStore
    collector: Collector
    registries: DistributionRegistries
    puller: Puller

    async def pull(self, name: str, snapshotter: str = "overlayfs") -> None:
        """Pull an image from a registry, and unpack it."""
        remote = self.registries.open(parse_reference(name), RegistryAccess())
        destination = Destination(name=name, unpackings=(Unpacking(snapshotter=snapshotter),))
        await self.puller.pull(NS, remote, destination, lambda _: None)

    async def run(self, key: str, parent: str, snapshotter: str = "overlayfs") -> Path:
        """As much of a container as there is here: its record and its files; gives the latter."""
        async with self.leases.hold(NS):
            target = self.snapshotters[snapshotter]
            await target.prepare(NS, key, parent)
            container = Container(
                key,
                "io.containerd.runc.v2",
                spec=TypedValue("types.containerd.io/opencontainers/runtime-spec/1/Spec", b"{}"),
                snapshotter=snapshotter,
                snapshot_key=key,
            )
            await self.containers.create(NS, container)
        return target.root

    async def remove(self, key: str, snapshotter: str = "overlayfs") -> None:
        """Remove a container."""
        await self.containers.delete(NS, key)
        with suppress(NotFound):  # nothing refers to it now: the collector may have been quicker
            await self.snapshotters[snapshotter].remove(NS, key)

    async def is_empty(self) -> bool:
        """Whether there is no row and no file of content and snapshots."""
        rows = await self.db.read(
            lambda tx: [
                tx.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
                for table in ("blobs", "content", "ingests", "images", "snapshots", "leases")
            ]
        )
        files = [path for path in (self.root / "content").rglob("*") if path.is_file()]
        directories = [path for kept in self.snapshotters.values() for path in kept.root.iterdir()]
        return not any(rows) and not files and not directories


def nothing(_: str) -> None:
    """Trace nothing."""


@asynccontextmanager
async def open_storage(
    root: Path, *, trace: Callable[[str], None] = nothing
) -> AsyncIterator[StorageNode]:
    """A start on ``root``, and its end."""
    async with AsyncExitStack() as stack:
        umask = os.umask(0)  # as a worker has it
        stack.callback(os.umask, umask)
        db = Database(root / "meta.db")
        await asyncio.to_thread(db.open, MIGRATIONS)
        stack.push_async_callback(asyncio.to_thread, db.close)
        journal = Journal(db, encode_event)
        journal.attach()
        leases = LeaseManager(db, mutations=UNHEARD)
        await leases.begin(await db.write(meta.next_epoch))
        lock = GcLock()
        content = LocalContentStore(root, db, events=journal, gc_lock=lock, trace=trace)
        await content.reconcile()
        ids = SnapshotIds()
        snapshotters: dict[str, DirectorySnapshotter] = {}
        for kind in (OverlaySnapshotter, NativeSnapshotter):
            made = kind(root, db, events=journal, leases=leases, ids=ids, trace=trace)
            await made.open()
            stack.push_async_callback(made.close)
            await made.cleanup()
            snapshotters[made.name] = made
        collector = Collector(
            db, journal, lock, content=content, snapshotters=snapshotters, trace=trace
        )

        async def collect() -> None:
            await collector.collect()

        images = LocalImageStore(db, journal, mutations=UNHEARD, collect=collect)
        containers = LocalContainerStore(db, journal, mutations=UNHEARD)
        applier = Applier(content, root / "scratch")
        unpacker = LayerUnpacker(
            content, snapshotters, applier, leases, default="overlayfs", trace=trace
        )
        registries = await stack.enter_async_context(
            DistributionRegistries(
                limits=HttpLimits(connect_timeout_s=2, read_timeout_s=5),
                policy=RetryPolicy(attempts=2, first_delay_s=0.001),
            )
        )
        puller = Puller(
            content,
            images,
            leases,
            fetcher=BlobFetcher(content, max_downloads=4),
            unpacking=ImageUnpacking(content, unpacker, host=HOST),
        )
        yield StorageNode(
            root,
            db,
            journal,
            leases,
            content,
            snapshotters,
            applier,
            images,
            containers,
            collector,
            registries,
            puller,
        )


@asynccontextmanager
async def open_checker(root: Path) -> AsyncIterator[Checker]:
    """A checker on a root that is closed, so that nothing of a start changes it."""
    async with opened_database(root / "meta.db") as db, DistributionRegistries() as registries:
        ids, events, leases = SnapshotIds(), RecordedEvents(), RecordedLeases()
        store = LocalContentStore(root, db, events=events, gc_lock=GcLock())
        snapshotters = [
            kind(root, db, events=events, leases=leases, ids=ids)
            for kind in (OverlaySnapshotter, NativeSnapshotter)
        ]
        umask = os.umask(0)  # as a worker has it
        try:
            yield Checker(
                root,
                db,
                store=store,
                snapshotters=snapshotters,
                applier=Applier(store, root / "scratch"),
                registries=registries,
            )
        finally:
            os.umask(umask)
