"""``containerd.services.containers.v1.Containers``: records of containers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from google.protobuf.empty_pb2 import Empty

from protos.containerd.services.containers.v1 import containers_pb2 as pb
from protos.containerd.services.containers.v1 import containers_pb2_grpc
from services.common.server import request_namespace
from services.containerd.containers.store import Container
from services.containerd.rpc.encoding import from_any, nanoseconds, timestamp, to_any

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from services.containerd.containers.store import ContainerStore
    from services.containerd.rpc.context import Context


class ContainersService(containers_pb2_grpc.ContainersServicer):
    """Serves a container store.

    Args:
        store: has the records.
        announced: called when there is to be a record, mostly for a task that follows.
    """

    def __init__(self, store: ContainerStore, announced: Callable[[], None]) -> None:
        self._store = store
        self._announced = announced

    async def Get(
        self, request: pb.GetContainerRequest, context: Context
    ) -> pb.GetContainerResponse:
        """See the contract."""
        container = await self._store.get(request_namespace(context), request.id)
        return pb.GetContainerResponse(container=to_pb(container))

    async def List(
        self, request: pb.ListContainersRequest, context: Context
    ) -> pb.ListContainersResponse:
        """See the contract."""
        found = await self._store.find(request_namespace(context), request.filters)
        return pb.ListContainersResponse(containers=map(to_pb, found))

    async def ListStream(
        self, request: pb.ListContainersRequest, context: Context
    ) -> AsyncIterator[pb.ListContainerMessage]:
        """See the contract."""
        for container in await self._store.find(request_namespace(context), request.filters):
            yield pb.ListContainerMessage(container=to_pb(container))

    async def Create(
        self, request: pb.CreateContainerRequest, context: Context
    ) -> pb.CreateContainerResponse:
        """See the contract."""
        self._announced()
        created = await self._store.create(request_namespace(context), from_pb(request.container))
        return pb.CreateContainerResponse(container=to_pb(created))

    async def Update(
        self, request: pb.UpdateContainerRequest, context: Context
    ) -> pb.UpdateContainerResponse:
        """See the contract."""
        updated = await self._store.update(
            request_namespace(context), from_pb(request.container), request.update_mask.paths
        )
        return pb.UpdateContainerResponse(container=to_pb(updated))

    async def Delete(self, request: pb.DeleteContainerRequest, context: Context) -> Empty:
        """See the contract."""
        await self._store.delete(request_namespace(context), request.id)
        return Empty()


def to_pb(container: Container) -> pb.Container:
    """A record on the wire."""
    message = pb.Container(
        id=container.id,
        labels=dict(container.labels),
        image=container.image,
        runtime=pb.Container.Runtime(
            name=container.runtime_name, options=to_any(container.runtime_options)
        ),
        spec=to_any(container.spec),
        snapshotter=container.snapshotter,
        snapshot_key=container.snapshot_key,
        created_at=timestamp(container.created_at_ns),
        updated_at=timestamp(container.updated_at_ns),
        sandbox=container.sandbox,
    )
    for name, value in container.extensions.items():
        message.extensions[name].type_url = value.type_url
        message.extensions[name].value = value.value
    return message


def from_pb(message: pb.Container) -> Container:
    """A record off the wire."""
    extensions = {name: from_any(value) for name, value in message.extensions.items()}
    return Container(
        id=message.id,
        runtime_name=message.runtime.name,
        runtime_options=from_any(message.runtime.options),
        spec=from_any(message.spec),
        image=message.image,
        snapshotter=message.snapshotter,
        snapshot_key=message.snapshot_key,
        labels=dict(message.labels),
        extensions={name: value for name, value in extensions.items() if value is not None},
        sandbox=message.sandbox,
        created_at_ns=nanoseconds(message.created_at),
        updated_at_ns=nanoseconds(message.updated_at),
    )
