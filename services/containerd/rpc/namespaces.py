"""``containerd.services.namespaces.v1.Namespaces``: the namespaces themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from google.protobuf.empty_pb2 import Empty

from protos.containerd.services.namespaces.v1 import namespace_pb2 as pb
from protos.containerd.services.namespaces.v1 import namespace_pb2_grpc
from services.containerd.namespaces.registry import Namespace

if TYPE_CHECKING:
    from services.containerd.namespaces.registry import Namespaces
    from services.containerd.rpc.context import Context


class NamespacesService(namespace_pb2_grpc.NamespacesServicer):
    """Serves the namespaces of a node; its calls need no namespace in their metadata."""

    def __init__(self, namespaces: Namespaces) -> None:
        self._namespaces = namespaces

    async def Get(
        self, request: pb.GetNamespaceRequest, context: Context
    ) -> pb.GetNamespaceResponse:
        """See the contract."""
        return pb.GetNamespaceResponse(namespace=_to_pb(await self._namespaces.get(request.name)))

    async def List(
        self, request: pb.ListNamespacesRequest, context: Context
    ) -> pb.ListNamespacesResponse:
        """See the contract."""
        return pb.ListNamespacesResponse(namespaces=map(_to_pb, await self._namespaces.find()))

    async def Create(
        self, request: pb.CreateNamespaceRequest, context: Context
    ) -> pb.CreateNamespaceResponse:
        """See the contract."""
        created = await self._namespaces.create(_from_pb(request.namespace))
        return pb.CreateNamespaceResponse(namespace=_to_pb(created))

    async def Update(
        self, request: pb.UpdateNamespaceRequest, context: Context
    ) -> pb.UpdateNamespaceResponse:
        """See the contract."""
        updated = await self._namespaces.update(
            _from_pb(request.namespace), request.update_mask.paths
        )
        return pb.UpdateNamespaceResponse(namespace=_to_pb(updated))

    async def Delete(self, request: pb.DeleteNamespaceRequest, context: Context) -> Empty:
        """See the contract."""
        await self._namespaces.delete(request.name)
        return Empty()


def _to_pb(namespace: Namespace) -> pb.Namespace:
    return pb.Namespace(name=namespace.name, labels=dict(namespace.labels))


def _from_pb(message: pb.Namespace) -> Namespace:
    return Namespace(message.name, dict(message.labels))
