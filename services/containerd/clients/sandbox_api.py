"""The sandbox API of a shim: implements :class:`services.containerd.tasks.sandbox.SandboxShim`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from protos.containerd.runtime.sandbox.v1 import sandbox_pb2 as pb
from services.containerd.clients.task_api import TaskApiClient
from services.containerd.rpc.encoding import from_any, nanoseconds, to_any
from services.containerd.rpc.mounts import to_mounts
from services.containerd.tasks.sandbox import SandboxEnd, SandboxStatus, StartedSandbox

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from services.containerd.clients.task_api import Answer
    from services.containerd.tasks.sandbox import NewSandbox
    from services.containerd.typed import TypedValue

SERVICE = pb.DESCRIPTOR.services_by_name["Sandbox"].full_name

_QUICK_S = 30.0
_SLOW_S = 600.0
_WAIT_S = 24 * 3600.0


class SandboxApiClient(TaskApiClient):
    """The part of a shim that some have."""

    async def create_sandbox(self, request: NewSandbox) -> None:
        """As ``SandboxShim.create_sandbox``."""
        message = pb.CreateSandboxRequest(
            sandbox_id=self._id,
            bundle_path=request.bundle,
            rootfs=to_mounts(request.rootfs),
            options=to_any(request.options),
            netns_path=request.netns_path,
            annotations=dict(request.annotations),
        )
        await self._sandbox("CreateSandbox", message, pb.CreateSandboxResponse, _SLOW_S)

    async def start_sandbox(self) -> StartedSandbox:
        """As ``SandboxShim.start_sandbox``."""
        request = pb.StartSandboxRequest(sandbox_id=self._id)
        answer = await self._sandbox("StartSandbox", request, pb.StartSandboxResponse, _SLOW_S)
        return StartedSandbox(answer.pid, nanoseconds(answer.created_at), from_any(answer.spec))

    async def sandbox_platform(self) -> tuple[str, str, str]:
        """As ``SandboxShim.sandbox_platform``."""
        request = pb.PlatformRequest(sandbox_id=self._id)
        found = (await self._sandbox("Platform", request, pb.PlatformResponse, _QUICK_S)).platform
        return found.os, found.architecture, found.variant

    async def stop_sandbox(self, timeout_s: int) -> None:
        """As ``SandboxShim.stop_sandbox``."""
        request = pb.StopSandboxRequest(sandbox_id=self._id, timeout_secs=timeout_s)
        await self._sandbox("StopSandbox", request, pb.StopSandboxResponse, _SLOW_S)

    async def wait_sandbox(self) -> SandboxEnd:
        """As ``SandboxShim.wait_sandbox``."""
        request = pb.WaitSandboxRequest(sandbox_id=self._id)
        answer = await self._sandbox("WaitSandbox", request, pb.WaitSandboxResponse, _WAIT_S)
        return SandboxEnd(answer.exit_status, nanoseconds(answer.exited_at))

    async def sandbox_status(self, *, verbose: bool) -> SandboxStatus:
        """As ``SandboxShim.sandbox_status``."""
        request = pb.SandboxStatusRequest(sandbox_id=self._id, verbose=verbose)
        answer = await self._sandbox("SandboxStatus", request, pb.SandboxStatusResponse, _QUICK_S)
        return SandboxStatus(
            id=answer.sandbox_id,
            pid=answer.pid,
            state=answer.state,
            info=dict(answer.info),
            created_at_ns=nanoseconds(answer.created_at),
            exited_at_ns=nanoseconds(answer.exited_at),
            extra=from_any(answer.extra),
        )

    async def shutdown_sandbox(self) -> None:
        """As ``SandboxShim.shutdown_sandbox``."""
        request = pb.ShutdownSandboxRequest(sandbox_id=self._id)
        await self._sandbox("ShutdownSandbox", request, pb.ShutdownSandboxResponse, _SLOW_S)

    async def sandbox_metrics(self) -> tuple[int, TypedValue | None]:
        """As ``SandboxShim.sandbox_metrics``."""
        request = pb.SandboxMetricsRequest(sandbox_id=self._id)
        answer = await self._sandbox("SandboxMetrics", request, pb.SandboxMetricsResponse, _QUICK_S)
        return nanoseconds(answer.metrics.timestamp), from_any(answer.metrics.data)

    async def _sandbox(
        self, method: str, request: Message, answer: type[Answer], timeout_s: float
    ) -> Answer:
        return await self._invoke(f"{SERVICE}/{method}", request, answer, timeout_s)
