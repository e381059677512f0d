"""Images on their way: pull, push, import, export, and what layers are packed and unpacked with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from protos.containerd.services.diff.v1 import diff_pb2, diff_pb2_grpc
from protos.containerd.services.streaming.v1 import streaming_pb2, streaming_pb2_grpc
from protos.containerd.services.transfer.v1 import transfer_pb2, transfer_pb2_grpc
from services.common.server import Service
from services.containerd.diff.local_applier import LocalApplier
from services.containerd.diff.local_comparer import LocalComparer
from services.containerd.diff.pool import WorkerPool
from services.containerd.images.archive import ArchiveLimits, ArchiveReader
from services.containerd.images.platform import host_platform
from services.containerd.remotes.mirrors import DistributionRegistries
from services.containerd.rpc.diff import DiffService
from services.containerd.rpc.streaming import StreamingService, StreamRegister
from services.containerd.rpc.transfer import TransferService
from services.containerd.transfer.fetch import BlobFetcher
from services.containerd.transfer.load import Loader
from services.containerd.transfer.metered import MeteredTransfers
from services.containerd.transfer.pull import Puller
from services.containerd.transfer.push import Pusher
from services.containerd.transfer.unpack import LayerUnpacker
from services.containerd.transfer.unpacking import ImageUnpacking

if TYPE_CHECKING:
    from services.containerd.late.foundations import Foundations


async def make(on: Foundations) -> list[Service]:
    """Diff, Transfer and Streaming."""
    workers = await on.stack.enter_async_context(WorkerPool(on.config.unpack_workers))
    registries = await on.stack.enter_async_context(
        DistributionRegistries(hosts=on.config.registry_hosts)
    )
    applier = LocalApplier(on.content, workers, on.scratch)
    comparer = LocalComparer(on.content, workers, on.scratch)
    streams = StreamRegister()
    return [
        Service(
            diff_pb2_grpc.add_DiffServicer_to_server,
            DiffService(applier, comparer),
            diff_pb2.DESCRIPTOR.services_by_name["Diff"],
        ),
        Service(
            streaming_pb2_grpc.add_StreamingServicer_to_server,
            StreamingService(streams),
            streaming_pb2.DESCRIPTOR.services_by_name["Streaming"],
        ),
        Service(
            transfer_pb2_grpc.add_TransferServicer_to_server,
            TransferService(_transfers(on, applier), registries, streams),
            transfer_pb2.DESCRIPTOR.services_by_name["Transfer"],
        ),
    ]


def _transfers(on: Foundations, applier: LocalApplier) -> MeteredTransfers:
    config = on.config
    unpacker = LayerUnpacker(
        on.content,
        on.snapshotters,
        applier,
        on.leases,
        default=config.snapshotter,
        floor=on.floor,
    )
    unpacking = ImageUnpacking(on.content, unpacker, host=host_platform())
    stores = on.content, on.images, on.leases
    return MeteredTransfers(
        *stores,
        timed=on.metrics.timed_transfer,
        puller=Puller(
            *stores,
            fetcher=BlobFetcher(on.content, max_downloads=config.max_downloads),
            unpacking=unpacking,
        ),
        loader=Loader(
            *stores,
            reader=ArchiveReader(
                on.content, limits=ArchiveLimits(total_bytes=config.max_archive_bytes)
            ),
            unpacking=unpacking,
        ),
        pusher=Pusher(*stores, max_uploads=config.max_downloads),
    )
