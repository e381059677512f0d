"""containerd's container records."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from google.protobuf import any_pb2

from protos.containerd.services.containers.v1 import containers_pb2 as pb
from protos.containerd.services.containers.v1 import containers_pb2_grpc
from protos.containerd.types.runc.options import oci_pb2
from services.common.errors import AlreadyExists, NotFound
from services.daemon.clients.connection import TIMEOUT_S

if TYPE_CHECKING:
    from services.daemon.clients.connection import Connection
    from services.daemon.containers.runtime import NewContainer

RUNTIME_NAME = "io.containerd.runc.v2"
SPEC_TYPE = "types.containerd.io/opencontainers/runtime-spec/1/Spec"
PROCESS_TYPE = "types.containerd.io/opencontainers/runtime-spec/1/Process"


def runtime_options(program: str) -> any_pb2.Any:
    """Options that have the shim run ``program``, packed under containerd's bare type URL."""
    options = oci_pb2.Options(binary_name=program)
    return any_pb2.Any(
        type_url=oci_pb2.Options.DESCRIPTOR.full_name, value=options.SerializeToString()
    )


def container_to_pb(container: NewContainer) -> pb.Container:
    """A record, as containerd has it."""
    return pb.Container(
        id=container.id,
        labels=container.labels,
        image=container.image,
        runtime=pb.Container.Runtime(name=RUNTIME_NAME, options=runtime_options(container.runtime)),
        spec=any_pb2.Any(type_url=SPEC_TYPE, value=json.dumps(container.spec).encode()),
        snapshotter=container.snapshotter,
        snapshot_key=container.id,
    )


class ContainerdContainers:
    """:class:`services.daemon.containers.runtime.RuntimeContainers` on containerd."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._stub = containers_pb2_grpc.ContainersStub(connection.channel)

    async def put(self, container: NewContainer) -> None:
        """See the interface."""
        request = pb.CreateContainerRequest(container=container_to_pb(container))
        try:
            with self._connection.calls():
                await self._stub.Create(request, timeout=TIMEOUT_S)
        except AlreadyExists:
            await self.delete(container.id)
            with self._connection.calls():
                await self._stub.Create(request, timeout=TIMEOUT_S)

    async def delete(self, container_id: str) -> None:
        """See the interface."""
        try:
            with self._connection.calls():
                await self._stub.Delete(
                    pb.DeleteContainerRequest(id=container_id), timeout=TIMEOUT_S
                )
        except NotFound:
            return

    async def spec(self, container_id: str) -> dict[str, Any]:
        """See the interface."""
        with self._connection.calls():
            answer = await self._stub.Get(
                pb.GetContainerRequest(id=container_id), timeout=TIMEOUT_S
            )
        spec: dict[str, Any] = json.loads(answer.container.spec.value)
        return spec
