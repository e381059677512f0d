"""Serves containerd.runtime.sandbox.v1.Sandbox: see :mod:`services.shim.sandboxes`."""

from __future__ import annotations

import os
import platform
import time
from typing import TYPE_CHECKING, Any

from protos.containerd.runtime.sandbox.v1 import sandbox_pb2 as pb
from protos.containerd.runtime.sandbox.v1 import sandbox_pb2_grpc
from protos.containerd.types import metrics_pb2, platform_pb2
from services.shim.clients.events import timestamp

if TYPE_CHECKING:
    from grpc.aio import ServicerContext

    from services.shim.sandboxes import Sandboxes

    Context = ServicerContext[Any, Any]

READY, NOT_READY = "SANDBOX_READY", "SANDBOX_NOTREADY"
"""The states, in the words of Kubernetes' CRI, which clients of other sandboxes read."""

_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


class SandboxService(sandbox_pb2_grpc.SandboxServicer):
    """Sandboxes of one shim. The pid of a sandbox is the shim's: it has no process of its own."""

    def __init__(self, sandboxes: Sandboxes) -> None:
        self._sandboxes = sandboxes

    async def CreateSandbox(
        self, request: pb.CreateSandboxRequest, context: Context
    ) -> pb.CreateSandboxResponse:
        """See the contract."""
        self._sandboxes.create(request.sandbox_id, request.netns_path)
        return pb.CreateSandboxResponse()

    async def StartSandbox(
        self, request: pb.StartSandboxRequest, context: Context
    ) -> pb.StartSandboxResponse:
        """See the contract."""
        sandbox = self._sandboxes.start(request.sandbox_id)
        return pb.StartSandboxResponse(pid=os.getpid(), created_at=timestamp(sandbox.created_at_ns))

    async def Platform(self, request: pb.PlatformRequest, context: Context) -> pb.PlatformResponse:
        """See the contract."""
        self._sandboxes.get(request.sandbox_id)
        machine = platform.machine()
        return pb.PlatformResponse(
            platform=platform_pb2.Platform(
                os="linux", architecture=_ARCHITECTURES.get(machine, machine)
            )
        )

    async def StopSandbox(
        self, request: pb.StopSandboxRequest, context: Context
    ) -> pb.StopSandboxResponse:
        """See the contract."""
        self._sandboxes.stop(request.sandbox_id)
        return pb.StopSandboxResponse()

    async def WaitSandbox(
        self, request: pb.WaitSandboxRequest, context: Context
    ) -> pb.WaitSandboxResponse:
        """See the contract."""
        sandbox = await self._sandboxes.wait(request.sandbox_id)
        return pb.WaitSandboxResponse(exit_status=0, exited_at=timestamp(sandbox.exited_at_ns))

    async def SandboxStatus(
        self, request: pb.SandboxStatusRequest, context: Context
    ) -> pb.SandboxStatusResponse:
        """See the contract."""
        sandbox = self._sandboxes.get(request.sandbox_id)
        return pb.SandboxStatusResponse(
            sandbox_id=request.sandbox_id,
            pid=os.getpid(),
            state=READY if sandbox.ready else NOT_READY,
            info={"netnsPath": sandbox.netns_path} if request.verbose else {},
            created_at=timestamp(sandbox.created_at_ns),
            exited_at=timestamp(sandbox.exited_at_ns) if sandbox.exited_at_ns else None,
        )

    async def PingSandbox(self, request: pb.PingRequest, context: Context) -> pb.PingResponse:
        """See the contract."""
        self._sandboxes.get(request.sandbox_id)
        return pb.PingResponse()

    async def ShutdownSandbox(
        self, request: pb.ShutdownSandboxRequest, context: Context
    ) -> pb.ShutdownSandboxResponse:
        """See the contract. The process goes when its task API, or Control.Leave, is told so."""
        self._sandboxes.stop(request.sandbox_id)
        return pb.ShutdownSandboxResponse()

    async def SandboxMetrics(
        self, request: pb.SandboxMetricsRequest, context: Context
    ) -> pb.SandboxMetricsResponse:
        """See the contract. A sandbox has no cgroup, so there are no figures."""
        self._sandboxes.get(request.sandbox_id)
        return pb.SandboxMetricsResponse(
            metrics=metrics_pb2.Metric(id=request.sandbox_id, timestamp=timestamp(time.time_ns()))
        )
