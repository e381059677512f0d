"""``containerd.services.sandbox.v1``: the records of sandboxes, and the sandboxes themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from protos.containerd.services.sandbox.v1 import sandbox_pb2 as pb
from protos.containerd.services.sandbox.v1 import sandbox_pb2_grpc
from protos.containerd.types import metrics_pb2, platform_pb2, sandbox_pb2
from services.common.errors import InvalidArgument, NotFound
from services.common.mounts import Mount
from services.common.server import request_namespace
from services.containerd.rpc.encoding import from_any, nanoseconds, timestamp, to_any
from services.containerd.sandboxes.controller import NAME
from services.containerd.sandboxes.store import Sandbox

if TYPE_CHECKING:
    from services.common.draining import Draining
    from services.containerd.rpc.context import Context
    from services.containerd.sandboxes.controller import SandboxController
    from services.containerd.sandboxes.store import SandboxStore


class SandboxStoreService(sandbox_pb2_grpc.StoreServicer):
    """Serves a sandbox store."""

    def __init__(self, store: SandboxStore) -> None:
        self._store = store

    async def Create(
        self, request: pb.StoreCreateRequest, context: Context
    ) -> pb.StoreCreateResponse:
        """See the contract."""
        made = await self._store.create(request_namespace(context), from_pb(request.sandbox))
        return pb.StoreCreateResponse(sandbox=to_pb(made))

    async def Update(
        self, request: pb.StoreUpdateRequest, context: Context
    ) -> pb.StoreUpdateResponse:
        """See the contract."""
        updated = await self._store.update(
            request_namespace(context), from_pb(request.sandbox), request.fields
        )
        return pb.StoreUpdateResponse(sandbox=to_pb(updated))

    async def Delete(
        self, request: pb.StoreDeleteRequest, context: Context
    ) -> pb.StoreDeleteResponse:
        """See the contract."""
        await self._store.delete(request_namespace(context), request.sandbox_id)
        return pb.StoreDeleteResponse()

    async def List(self, request: pb.StoreListRequest, context: Context) -> pb.StoreListResponse:
        """See the contract."""
        found = await self._store.find(request_namespace(context), request.filters)
        return pb.StoreListResponse(list=map(to_pb, found))

    async def Get(self, request: pb.StoreGetRequest, context: Context) -> pb.StoreGetResponse:
        """See the contract."""
        found = await self._store.get(request_namespace(context), request.sandbox_id)
        return pb.StoreGetResponse(sandbox=to_pb(found))


class SandboxControllerService(sandbox_pb2_grpc.ControllerServicer):
    """Serves the controller of this name, the only one here.

    Args:
        controller: it.
        draining: ends the waits when containerd stops.
    """

    def __init__(self, controller: SandboxController, draining: Draining) -> None:
        self._controller = controller
        self._draining = draining

    async def Create(
        self, request: pb.ControllerCreateRequest, context: Context
    ) -> pb.ControllerCreateResponse:
        """See the contract."""
        _check_sandboxer(request.sandboxer)
        sandbox = Sandbox(request.sandbox_id)
        if request.HasField("sandbox"):
            sandbox = from_pb(request.sandbox)
        await self._controller.create(
            request_namespace(context),
            sandbox,
            rootfs=tuple(
                Mount(mount.type, mount.source, mount.target, tuple(mount.options))
                for mount in request.rootfs
            ),
            options=from_any(request.options),
            netns_path=request.netns_path,
            annotations=dict(request.annotations),
        )
        return pb.ControllerCreateResponse(sandbox_id=sandbox.id)

    async def Start(
        self, request: pb.ControllerStartRequest, context: Context
    ) -> pb.ControllerStartResponse:
        """See the contract."""
        _check_sandboxer(request.sandboxer)
        started, address = await self._controller.start(
            request_namespace(context), request.sandbox_id
        )
        return pb.ControllerStartResponse(
            sandbox_id=request.sandbox_id,
            pid=started.pid,
            created_at=timestamp(started.created_at_ns),
            address=_endpoint(address),
            version=_API_VERSION,
            spec=to_any(started.spec),
        )

    async def Platform(
        self, request: pb.ControllerPlatformRequest, context: Context
    ) -> pb.ControllerPlatformResponse:
        """See the contract."""
        _check_sandboxer(request.sandboxer)
        system, architecture, variant = await self._controller.platform(
            request_namespace(context), request.sandbox_id
        )
        return pb.ControllerPlatformResponse(
            platform=platform_pb2.Platform(os=system, architecture=architecture, variant=variant)
        )

    async def Stop(
        self, request: pb.ControllerStopRequest, context: Context
    ) -> pb.ControllerStopResponse:
        """See the contract."""
        _check_sandboxer(request.sandboxer)
        await self._controller.stop(
            request_namespace(context), request.sandbox_id, request.timeout_secs
        )
        return pb.ControllerStopResponse()

    async def Wait(
        self, request: pb.ControllerWaitRequest, context: Context
    ) -> pb.ControllerWaitResponse:
        """See the contract."""
        _check_sandboxer(request.sandboxer)
        async with self._draining.endless():
            end = await self._controller.wait(request_namespace(context), request.sandbox_id)
        return pb.ControllerWaitResponse(
            exit_status=end.exit_status, exited_at=timestamp(end.exited_at_ns)
        )

    async def Status(
        self, request: pb.ControllerStatusRequest, context: Context
    ) -> pb.ControllerStatusResponse:
        """See the contract."""
        _check_sandboxer(request.sandboxer)
        status, address = await self._controller.status(
            request_namespace(context), request.sandbox_id, verbose=request.verbose
        )
        return pb.ControllerStatusResponse(
            sandbox_id=status.id,
            pid=status.pid,
            state=status.state,
            info=dict(status.info),
            created_at=timestamp(status.created_at_ns),
            exited_at=timestamp(status.exited_at_ns),
            extra=to_any(status.extra),
            address=_endpoint(address),
            version=_API_VERSION if address else 0,
        )

    async def Shutdown(
        self, request: pb.ControllerShutdownRequest, context: Context
    ) -> pb.ControllerShutdownResponse:
        """See the contract."""
        _check_sandboxer(request.sandboxer)
        await self._controller.shutdown(request_namespace(context), request.sandbox_id)
        return pb.ControllerShutdownResponse()

    async def Metrics(
        self, request: pb.ControllerMetricsRequest, context: Context
    ) -> pb.ControllerMetricsResponse:
        """See the contract."""
        _check_sandboxer(request.sandboxer)
        taken_ns, figures = await self._controller.metrics(
            request_namespace(context), request.sandbox_id
        )
        return pb.ControllerMetricsResponse(
            metrics=metrics_pb2.Metric(
                id=request.sandbox_id, timestamp=timestamp(taken_ns), data=to_any(figures)
            )
        )

    async def Update(
        self, request: pb.ControllerUpdateRequest, context: Context
    ) -> pb.ControllerUpdateResponse:
        """See the contract."""
        _check_sandboxer(request.sandboxer)
        if not request.HasField("sandbox"):
            raise InvalidArgument("an update needs a sandbox", field="sandbox")
        await self._controller.update(request_namespace(context), request.sandbox_id)
        return pb.ControllerUpdateResponse()


_API_VERSION = 3
"""Of the task API at a sandbox' address."""


def to_pb(sandbox: Sandbox) -> sandbox_pb2.Sandbox:
    """A record on the wire."""
    message = sandbox_pb2.Sandbox(
        sandbox_id=sandbox.id,
        runtime=sandbox_pb2.Sandbox.Runtime(
            name=sandbox.runtime_name, options=to_any(sandbox.runtime_options)
        ),
        spec=to_any(sandbox.spec),
        labels=dict(sandbox.labels),
        created_at=timestamp(sandbox.created_at_ns),
        updated_at=timestamp(sandbox.updated_at_ns),
        sandboxer=sandbox.sandboxer,
    )
    for name, value in sandbox.extensions.items():
        message.extensions[name].type_url = value.type_url
        message.extensions[name].value = value.value
    return message


def from_pb(message: sandbox_pb2.Sandbox) -> Sandbox:
    """A record off the wire."""
    extensions = {name: from_any(value) for name, value in message.extensions.items()}
    return Sandbox(
        id=message.sandbox_id,
        runtime_name=message.runtime.name,
        runtime_options=from_any(message.runtime.options),
        spec=from_any(message.spec),
        labels=dict(message.labels),
        extensions={name: value for name, value in extensions.items() if value is not None},
        sandboxer=message.sandboxer,
        created_at_ns=nanoseconds(message.created_at),
        updated_at_ns=nanoseconds(message.updated_at),
    )


def _endpoint(address: str) -> str:
    """The address of a shim as upstream writes it: protocol, plus, socket."""
    address = address.partition("?")[0]
    return f"grpc+{address}" if address.startswith("unix:") else address


def _check_sandboxer(name: str) -> None:
    if not name:
        raise InvalidArgument(f"no sandbox controller is named: try '{NAME}'", field="sandboxer")
    if name != NAME:
        raise NotFound(
            f"sandbox controller '{name}' does not exist: there is '{NAME}'",
            resource=("sandboxer", name),
        )
