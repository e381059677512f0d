"""``theseus.engine.v1.System``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from protos.theseus.engine.v1 import system_pb2 as pb
from protos.theseus.engine.v1 import system_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from services.daemon.rpc.context import Context
    from services.daemon.system import SystemReporter
    from services.daemon.upgrades import Upgrades


class SystemService(system_pb2_grpc.SystemServicer):
    """Serves what is to be known about the engine itself."""

    def __init__(self, system: SystemReporter, upgrades: Upgrades) -> None:
        self._system = system
        self._upgrades = upgrades

    async def Version(self, request: pb.VersionRequest, context: Context) -> pb.VersionResponse:
        """See the contract."""
        found = await self._system.versions()
        return pb.VersionResponse(
            version=found.engine,
            python=found.python,
            kernel=found.kernel,
            containerd=found.containerd,
        )

    async def UpgradeShims(
        self, request: pb.UpgradeShimsRequest, context: Context
    ) -> AsyncIterator[pb.UpgradeShimsResponse]:
        """See the contract."""
        async for done in self._upgrades.shims(request.containers):
            yield pb.UpgradeShimsResponse(
                container_id=done.container_id,
                name=done.container_name,
                version_before=done.version_before,
                version=done.version,
                downtime_us=done.downtime_us,
                error=done.error,
            )

    async def Info(self, request: pb.InfoRequest, context: Context) -> pb.InfoResponse:
        """See the contract."""
        found = await self._system.info()
        return pb.InfoResponse(
            containers=found.containers,
            running=found.running,
            images=found.images,
            runtimes=[
                pb.RuntimeInfo(
                    name=runtime.name,
                    path=runtime.path,
                    version=runtime.version,
                    usable=runtime.usable,
                    reason=runtime.reason,
                )
                for runtime in found.runtimes
            ],
            default_runtime=found.default_runtime,
            cgroup_layout=found.cgroup_layout,
            root=found.root,
            state=found.state,
            kernel=found.kernel,
            operating_system=found.operating_system,
            cpus=found.cpus,
            memory_bytes=found.memory_bytes,
            containerd_ready=found.containerd_ready,
            bridge=found.bridge,
            bridge_subnet=found.bridge_subnet,
            warnings=found.warnings,
            snapshotter=found.snapshotter,
        )
