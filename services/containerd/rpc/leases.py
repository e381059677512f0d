"""``containerd.services.leases.v1.Leases``, and the lease that any other request runs under."""

from __future__ import annotations

from typing import TYPE_CHECKING

from google.protobuf.empty_pb2 import Empty

from protos.containerd.services.leases.v1 import leases_pb2 as pb
from protos.containerd.services.leases.v1 import leases_pb2_grpc
from services.common.server import request_namespace
from services.containerd.leases.lease import Lease, Resource, current_lease
from services.containerd.rpc.encoding import timestamp

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from services.common.server import Metadata
    from services.containerd.leases.lease import Leases
    from services.containerd.rpc.context import Context


LEASE_KEY = "containerd-lease"
"""gRPC metadata key of the lease that what a request makes belongs to, as upstream has it."""


def bind_lease(metadata: Metadata) -> None:
    """Make the lease that a request names the current one of its handler."""
    lease = ""
    for key, value in metadata:
        if key == LEASE_KEY and isinstance(value, str):
            lease = value
    current_lease.set(lease)


class LeasesService(leases_pb2_grpc.LeasesServicer):
    """Serves leases.

    Args:
        leases: keeps them.
        collect: collects garbage now, for deletions that wait for it.
    """

    def __init__(self, leases: Leases, *, collect: Callable[[], Awaitable[object]]) -> None:
        self._leases = leases
        self._collect = collect

    async def Create(self, request: pb.CreateRequest, context: Context) -> pb.CreateResponse:
        """See the contract."""
        lease = await self._leases.create(
            request_namespace(context), request.id, dict(request.labels)
        )
        return pb.CreateResponse(lease=_to_pb(lease))

    async def Delete(self, request: pb.DeleteRequest, context: Context) -> Empty:
        """See the contract."""
        await self._leases.delete(request_namespace(context), request.id)
        if request.sync:
            await self._collect()
        return Empty()

    async def List(self, request: pb.ListRequest, context: Context) -> pb.ListResponse:
        """See the contract."""
        found = await self._leases.find(request_namespace(context), request.filters)
        return pb.ListResponse(leases=map(_to_pb, found))

    async def AddResource(self, request: pb.AddResourceRequest, context: Context) -> Empty:
        """See the contract."""
        await self._leases.add(request_namespace(context), request.id, _resource(request.resource))
        return Empty()

    async def DeleteResource(self, request: pb.DeleteResourceRequest, context: Context) -> Empty:
        """See the contract."""
        await self._leases.remove(
            request_namespace(context), request.id, _resource(request.resource)
        )
        return Empty()

    async def ListResources(
        self, request: pb.ListResourcesRequest, context: Context
    ) -> pb.ListResourcesResponse:
        """See the contract."""
        found = await self._leases.resources(request_namespace(context), request.id)
        return pb.ListResourcesResponse(
            resources=[pb.Resource(id=resource.id, type=resource.type) for resource in found]
        )


def _to_pb(lease: Lease) -> pb.Lease:
    return pb.Lease(
        id=lease.id, created_at=timestamp(lease.created_at_ns), labels=dict(lease.labels)
    )


def _resource(message: pb.Resource) -> Resource:
    return Resource(message.type, message.id)
