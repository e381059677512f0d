"""Our own shim, over ttrpc (gRPC if it is of an older version): implements ``tasks.shim.Shim``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from protos.theseus.shim.v1 import control_pb2 as pb
from services.common.peer import Peer
from services.common.ttrpc.client import TtrpcClient
from services.containerd.clients.sandbox_api import SandboxApiClient
from services.containerd.tasks.processes import ProcessId
from services.containerd.tasks.shim import ProgramInfo, Reexecuted, ShimAddress

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from google.protobuf.message import Message

    from services.common.message_stream import MessageStream
    from services.containerd.clients.task_api import Answer
    from services.containerd.tasks.shim import ShimRequest

ATTACH_METHOD = "theseus.shim.v1.Streams/Attach"

_CONTROL = pb.DESCRIPTOR.services_by_name["Control"].full_name
_QUICK_S = 30.0
_SLOW_S = 600.0


async def dial_shim(path: Path) -> TtrpcClient:
    """Connect to a shim that waits to be one, ahead of its first call.

    Raises:
        OSError: nobody listens there.
    """
    return await TtrpcClient.connect(path, tells=True)


class ShimClient(SandboxApiClient):
    """One shim's services, connected to when first used.

    Args:
        namespace: containerd's.
        container_id: whose task the shim runs.
        address: ``unix://PATH``.
        way: a connection that there is already; see :func:`dial_shim`.
    """

    def __init__(
        self, *, namespace: str, container_id: str, address: str, way: TtrpcClient | None = None
    ) -> None:
        super().__init__(container_id)
        self._peer = Peer(address, namespace=namespace, connection=way)

    async def host(self, request: ShimRequest) -> ShimAddress:
        """As ``Shim.host``."""
        message = pb.HostRequest(
            namespace=request.namespace,
            id=request.id,
            bundle=str(request.bundle),
            instance_id=request.instance_id,
            adopt=request.adopt,
        )
        answer = await self._control("Host", message, pb.HostResponse)
        process = ProcessId(answer.pid, answer.pid_start_time)
        return ShimAddress(process, answer.address, answer.version)

    async def leave(self, *, now: bool = False) -> None:
        """As ``Shim.leave``."""
        await self._control("Leave", pb.LeaveRequest(id=self._id, now=now), pb.LeaveResponse)

    async def info(self) -> ProgramInfo:
        """As ``Shim.info``."""
        answer = await self._control("Info", pb.InfoRequest(), pb.InfoResponse)
        return ProgramInfo(answer.version, answer.generation)

    async def reexec(self, program: Sequence[str], generation: int) -> Reexecuted:
        """As ``Shim.reexec``."""
        request = pb.ReexecRequest(program=program, generation=generation)
        answer = await self._control("Reexec", request, pb.ReexecResponse, _SLOW_S)
        return Reexecuted(answer.version, answer.generation, answer.downtime_us)

    async def metrics(self) -> bytes:
        """As ``Shim.metrics``."""
        return (await self._control("Metrics", pb.MetricsRequest(), pb.MetricsResponse)).text

    async def attach(self) -> MessageStream:
        """As ``Shim.attach``."""
        return await self._peer.stream(ATTACH_METHOD)

    async def close(self) -> None:
        """As ``Shim.close``: calls under way end with ``Unavailable``."""
        await self._peer.close()

    async def _control(
        self, name: str, request: Message, answer: type[Answer], timeout_s: float = _QUICK_S
    ) -> Answer:
        return await self._invoke(f"{_CONTROL}/{name}", request, answer, timeout_s)

    async def _invoke(
        self, method: str, request: Message, answer: type[Answer], timeout_s: float
    ) -> Answer:
        payload = request.SerializeToString()
        return answer.FromString(await self._peer.call(method, payload, timeout_s=timeout_s))
