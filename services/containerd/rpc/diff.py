"""``containerd.services.diff.v1.Diff``: layers unpacked into mounts, and made from them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from protos.containerd.services.diff.v1 import diff_pb2 as pb
from protos.containerd.services.diff.v1 import diff_pb2_grpc
from services.common.server import request_namespace
from services.containerd.rpc.encoding import from_descriptor, nanoseconds, to_descriptor
from services.containerd.rpc.mounts import from_mounts

if TYPE_CHECKING:
    from services.containerd.diff.applier import Applier
    from services.containerd.diff.comparer import Comparer
    from services.containerd.rpc.context import Context


class DiffService(diff_pb2_grpc.DiffServicer):
    """Serves an applier and a comparer. Payloads are for media types that we have none of."""

    def __init__(self, applier: Applier, comparer: Comparer) -> None:
        self._applier = applier
        self._comparer = comparer

    async def Apply(self, request: pb.ApplyRequest, context: Context) -> pb.ApplyResponse:
        """See the contract."""
        applied = await self._applier.apply(
            request_namespace(context),
            from_descriptor(request.diff),
            from_mounts(request.mounts),
            sync=request.sync_fs,
        )
        return pb.ApplyResponse(applied=to_descriptor(applied))

    async def Diff(self, request: pb.DiffRequest, context: Context) -> pb.DiffResponse:
        """See the contract."""
        has_epoch = request.HasField("source_date_epoch")
        made = await self._comparer.compare(
            request_namespace(context),
            from_mounts(request.left),
            from_mounts(request.right),
            media_type=request.media_type,
            ref=request.ref,
            labels=dict(request.labels),
            newest_ns=nanoseconds(request.source_date_epoch) if has_epoch else None,
        )
        return pb.DiffResponse(diff=to_descriptor(made))
