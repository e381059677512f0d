"""``containerd.services.snapshots.v1.Snapshots``: every snapshotter by its name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from google.protobuf.empty_pb2 import Empty

from protos.containerd.services.snapshots.v1 import snapshots_pb2 as pb
from protos.containerd.services.snapshots.v1 import snapshots_pb2_grpc
from services.common.errors import InvalidArgument
from services.common.server import request_namespace
from services.containerd.filters import map_field, parse
from services.containerd.rpc.encoding import timestamp
from services.containerd.rpc.mounts import to_mounts
from services.containerd.snapshots.snapshotter import Kind, SnapshotInfo

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence

    from services.containerd.rpc.context import Context
    from services.containerd.snapshots.snapshotter import Snapshotter

_INFOS_PER_MESSAGE = 100


class SnapshotsService(snapshots_pb2_grpc.SnapshotsServicer):
    """Serves snapshotters, each by what it is called."""

    def __init__(self, snapshotters: Mapping[str, Snapshotter]) -> None:
        self._snapshotters = snapshotters

    async def Prepare(
        self, request: pb.PrepareSnapshotRequest, context: Context
    ) -> pb.PrepareSnapshotResponse:
        """See the contract."""
        mounts = await self._snapshotter(request.snapshotter).prepare(
            request_namespace(context), request.key, request.parent, dict(request.labels)
        )
        return pb.PrepareSnapshotResponse(mounts=to_mounts(mounts))

    async def View(
        self, request: pb.ViewSnapshotRequest, context: Context
    ) -> pb.ViewSnapshotResponse:
        """See the contract."""
        mounts = await self._snapshotter(request.snapshotter).view(
            request_namespace(context), request.key, request.parent, dict(request.labels)
        )
        return pb.ViewSnapshotResponse(mounts=to_mounts(mounts))

    async def Mounts(self, request: pb.MountsRequest, context: Context) -> pb.MountsResponse:
        """See the contract."""
        mounts = await self._snapshotter(request.snapshotter).mounts(
            request_namespace(context), request.key
        )
        return pb.MountsResponse(mounts=to_mounts(mounts))

    async def Commit(self, request: pb.CommitSnapshotRequest, context: Context) -> Empty:
        """See the contract."""
        await self._snapshotter(request.snapshotter).commit(
            request_namespace(context),
            request.name,
            request.key,
            dict(request.labels),
            parent=request.parent,
        )
        return Empty()

    async def Remove(self, request: pb.RemoveSnapshotRequest, context: Context) -> Empty:
        """See the contract."""
        await self._snapshotter(request.snapshotter).remove(request_namespace(context), request.key)
        return Empty()

    async def Stat(
        self, request: pb.StatSnapshotRequest, context: Context
    ) -> pb.StatSnapshotResponse:
        """See the contract."""
        info = await self._snapshotter(request.snapshotter).stat(
            request_namespace(context), request.key
        )
        return pb.StatSnapshotResponse(info=_to_info(info))

    async def Update(
        self, request: pb.UpdateSnapshotRequest, context: Context
    ) -> pb.UpdateSnapshotResponse:
        """See the contract."""
        info = await self._snapshotter(request.snapshotter).update(
            request_namespace(context),
            request.info.name,
            dict(request.info.labels),
            request.update_mask.paths,
        )
        return pb.UpdateSnapshotResponse(info=_to_info(info))

    async def List(
        self, request: pb.ListSnapshotsRequest, context: Context
    ) -> AsyncIterator[pb.ListSnapshotsResponse]:
        """See the contract. In order of their names, as upstream."""
        wanted = parse(request.filters)
        found = await self._snapshotter(request.snapshotter).infos(request_namespace(context))
        infos = sorted(
            (info for info in found if wanted.matches(_fields(info))), key=lambda info: info.name
        )
        for begin in range(0, len(infos), _INFOS_PER_MESSAGE):
            part = infos[begin : begin + _INFOS_PER_MESSAGE]
            yield pb.ListSnapshotsResponse(info=map(_to_info, part))

    async def Usage(self, request: pb.UsageRequest, context: Context) -> pb.UsageResponse:
        """See the contract."""
        usage = await self._snapshotter(request.snapshotter).usage(
            request_namespace(context), request.key
        )
        return pb.UsageResponse(size=usage.size_bytes, inodes=usage.inodes)

    async def Cleanup(self, request: pb.CleanupRequest, context: Context) -> Empty:
        """See the contract."""
        await self._snapshotter(request.snapshotter).cleanup()
        return Empty()

    def _snapshotter(self, name: str) -> Snapshotter:
        if not name:
            raise InvalidArgument("the request names no snapshotter", field="snapshotter")
        if name not in self._snapshotters:
            known = ", ".join(sorted(self._snapshotters))
            raise InvalidArgument(
                f"snapshotter {name!r} is not known, only {known}", field="snapshotter"
            )
        return self._snapshotters[name]


def _to_info(info: SnapshotInfo) -> pb.Info:
    return pb.Info(
        name=info.name,
        parent=info.parent,
        kind=pb.Kind.ValueType(info.kind),
        created_at=timestamp(info.created_at_ns),
        updated_at=timestamp(info.updated_at_ns),
        labels=dict(info.labels),
    )


def _fields(info: SnapshotInfo) -> Callable[[Sequence[str]], str | None]:
    def field(path: Sequence[str]) -> str | None:
        match path[0]:
            case "kind":
                return Kind(info.kind).name.lower()
            case "name":
                return info.name
            case "parent":
                return info.parent
            case "labels":
                return map_field(info.labels, path[1:])
        return None

    return field
