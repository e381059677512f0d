"""The stores and transfers of a node, on a real database, with snapshots in memory."""

from __future__ import annotations

import asyncio
import gzip
from collections import Counter
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from protos.containerd.services.content.v1 import content_pb2, content_pb2_grpc
from protos.containerd.services.streaming.v1 import streaming_pb2, streaming_pb2_grpc
from protos.containerd.services.transfer.v1 import transfer_pb2, transfer_pb2_grpc
from services.common.errors import AlreadyExists, NotFound
from services.common.metrics import ServerMetrics
from services.common.mounts import Mount
from services.common.server import RpcServer, Service
from services.containerd.content.descriptor import Descriptor, Platform
from services.containerd.content.digest import digest_of
from services.containerd.content.local import LocalContentStore
from services.containerd.diff.applier import LowerNeeded
from services.containerd.gc.lock import GcLock
from services.containerd.images.archive import ArchiveReader
from services.containerd.remotes.http import HttpLimits
from services.containerd.remotes.mirrors import DistributionRegistries
from services.containerd.remotes.retry import RetryPolicy
from services.containerd.rpc.content import ContentService
from services.containerd.rpc.leases import bind_lease
from services.containerd.rpc.streaming import StreamingService, StreamRegister
from services.containerd.rpc.transfer import TransferService
from services.containerd.snapshots.snapshotter import Kind, SnapshotInfo
from services.containerd.transfer.fetch import BlobFetcher
from services.containerd.transfer.load import Loader
from services.containerd.transfer.pull import Puller
from services.containerd.transfer.push import Pusher
from services.containerd.transfer.transfers import Transfers
from services.containerd.transfer.unpack import LayerUnpacker
from services.containerd.transfer.unpacking import ImageUnpacking
from tests.fakes.metadata import open_metadata

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence
    from pathlib import Path

    from tests.fakes.metadata import Metadata

HOST = Platform("linux", "amd64")


class MemorySnapshotter:
    """Keeps what snapshots there are, and that they stand on each other."""

    name = "memory"
    capabilities = ("rebase",)

    def __init__(self) -> None:
        self.snapshots: dict[tuple[str, str], SnapshotInfo] = {}
        self.prepared: list[str] = []

    async def stat(self, namespace: str, key: str) -> SnapshotInfo:
        if (namespace, key) not in self.snapshots:
            raise NotFound(f"snapshot {key!r} does not exist")
        return self.snapshots[namespace, key]

    async def prepare(
        self, namespace: str, key: str, parent: str, labels: Mapping[str, str] | None = None
    ) -> list[Mount]:
        if parent:
            assert (await self.stat(namespace, parent)).kind is Kind.COMMITTED
        self.prepared.append(key)
        self.snapshots[namespace, key] = SnapshotInfo(key, Kind.ACTIVE, parent, labels or {})
        return [Mount("bind", key)]

    async def commit(
        self,
        namespace: str,
        name: str,
        key: str,
        labels: Mapping[str, str] | None = None,
        *,
        parent: str = "",
    ) -> None:
        if parent:
            assert (await self.stat(namespace, parent)).kind is Kind.COMMITTED
        if (namespace, name) in self.snapshots:
            raise AlreadyExists(f"snapshot {name!r} exists already")
        active = self.snapshots.pop((namespace, key))
        self.snapshots[namespace, name] = SnapshotInfo(
            name, Kind.COMMITTED, parent or active.parent, labels or {}
        )

    async def remove(self, namespace: str, key: str) -> None:
        await self.stat(namespace, key)
        del self.snapshots[namespace, key]

    def names(self, namespace: str = "a") -> set[str]:
        return {key for space, key in self.snapshots if space == namespace}


class CountingApplier:
    """Says what is in a layer, and counts how often it was asked."""

    def __init__(self, content: LocalContentStore) -> None:
        self._content = content
        self.applied: Counter[str] = Counter()
        self.detached: Counter[str] = Counter()
        self.needs_lower: set[str] = set()
        self.gates: dict[str, asyncio.Event] = {}
        self.begun = asyncio.Event()
        self.gate: asyncio.Event | None = None
        self.failure: Exception | None = None

    async def apply(
        self,
        namespace: str,
        descriptor: Descriptor,
        mounts: Sequence[Mount],
        *,
        sync: bool = False,
        detached: bool = False,
    ) -> Descriptor:
        assert mounts
        self.applied[descriptor.digest] += 1
        self.detached[descriptor.digest] += detached
        if detached and descriptor.digest in self.needs_lower:
            raise LowerNeeded("as the test wants it")
        if (gate := self.gates.get(descriptor.digest)) is not None:
            await gate.wait()
        self.begun.set()
        if self.gate is not None:
            await self.gate.wait()
        if self.failure is not None:
            raise self.failure
        data = await self._content.read(namespace, descriptor.digest, max_bytes=1 << 30)
        if data.startswith(b"\x1f\x8b"):
            data = gzip.decompress(data)
        return Descriptor("application/vnd.oci.image.layer.v1.tar", digest_of(data), len(data))


@dataclass
class TransferNode:
    meta: Metadata
    content: LocalContentStore
    snapshotter: MemorySnapshotter
    applier: CountingApplier
    registries: DistributionRegistries
    streams: StreamRegister
    transfers: Transfers
    socket: Path
    servers: list[RpcServer] = field(default_factory=list)

    async def serve(self) -> str:
        """Serve content, streaming and transfer; returns the address."""
        server = RpcServer(
            tier="containerd",
            socket=self.socket,
            services=[
                Service(
                    content_pb2_grpc.add_ContentServicer_to_server,
                    ContentService(self.content),
                    content_pb2.DESCRIPTOR.services_by_name["Content"],
                ),
                Service(
                    streaming_pb2_grpc.add_StreamingServicer_to_server,
                    StreamingService(self.streams),
                    streaming_pb2.DESCRIPTOR.services_by_name["Streaming"],
                ),
                Service(
                    transfer_pb2_grpc.add_TransferServicer_to_server,
                    TransferService(self.transfers, self.registries, self.streams),
                    transfer_pb2.DESCRIPTOR.services_by_name["Transfer"],
                ),
            ],
            metrics=ServerMetrics(),
            reflection=False,
            bind=bind_lease,
        )
        await server.start()
        self.servers.append(server)
        return f"unix:{self.socket}"

    async def digests(self, namespace: str = "a") -> set[str]:
        return {info.digest for info in await self.content.find(namespace)}


@asynccontextmanager
async def open_transfer_node(root: Path) -> AsyncIterator[TransferNode]:
    """A node below ``root``, closed at the end."""
    async with AsyncExitStack() as stack:
        meta = await stack.enter_async_context(open_metadata(root))
        content = LocalContentStore(root, meta.db, events=meta.journal, gc_lock=GcLock())
        snapshotter = MemorySnapshotter()
        applier = CountingApplier(content)
        registries = await stack.enter_async_context(
            DistributionRegistries(
                limits=HttpLimits(connect_timeout_s=2, read_timeout_s=1),
                policy=RetryPolicy(attempts=3, first_delay_s=0.001),
            )
        )
        unpacker = LayerUnpacker(
            content,
            {snapshotter.name: snapshotter},  # type: ignore[dict-item]  # the part that is used
            applier,
            meta.leases,
            default=snapshotter.name,
        )
        unpacking = ImageUnpacking(content, unpacker, host=HOST)
        transfers = Transfers(
            content,
            meta.images,
            meta.leases,
            puller=Puller(
                content,
                meta.images,
                meta.leases,
                fetcher=BlobFetcher(content, max_downloads=4),
                unpacking=unpacking,
            ),
            loader=Loader(
                content,
                meta.images,
                meta.leases,
                reader=ArchiveReader(content),
                unpacking=unpacking,
            ),
            pusher=Pusher(content, meta.images, meta.leases, max_uploads=4),
        )
        node = TransferNode(
            meta,
            content,
            snapshotter,
            applier,
            registries,
            StreamRegister(),
            transfers,
            root / "s.sock",
        )
        try:
            yield node
        finally:
            for server in node.servers:
                await server.stop(0)
