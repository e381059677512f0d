"""The task API of a shim, whoever wrote it and however it is reached: ttrpc or gRPC, v2 or v3.

The messages of both versions are the same, so those of v3 serve for both.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, TypeVar

from google.protobuf.empty_pb2 import Empty

from protos.containerd.task.v3 import shim_pb2 as pb
from services.common.errors import DataLoss
from services.containerd.rpc.encoding import from_any, nanoseconds, to_any
from services.containerd.rpc.mounts import to_mounts
from services.containerd.tasks.shim import (
    CreateTask,
    ProcessExit,
    ProcessInfo,
    ProcessState,
    ShimInfo,
    Stdio,
    TaskStatus,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from google.protobuf.message import Message

    from services.containerd.typed import TypedValue

_QUICK_S = 30.0
_SLOW_S = 600.0  # what runs a runtime, with hooks that may take their time
_SIGN_OF_LIFE_S = 2.0
_WAIT_S = 24 * 3600.0

Answer = TypeVar("Answer", bound="Message")


class TaskApiClient(ABC):
    """The part of ``Shim`` that every shim has.

    Args:
        container_id: whose task the shim runs.
        version: of the task API.
    """

    def __init__(self, container_id: str, version: str = "3") -> None:
        self._id = container_id
        self._service = f"containerd.task.v{version}.Task"

    @abstractmethod
    async def _invoke(
        self, method: str, request: Message, answer: type[Answer], timeout_s: float
    ) -> Answer:
        """Call a method: full name of the service, slash, name.

        Raises:
            TheseusError: as the shim says; ``Unavailable`` when it cannot be reached.
        """

    async def _ask(
        self, method: str, request: Message, answer: type[Answer], timeout_s: float
    ) -> Answer:
        return await self._invoke(f"{self._service}/{method}", request, answer, timeout_s)

    async def create(self, request: CreateTask) -> int:
        """As ``Shim.create``."""
        message = pb.CreateTaskRequest(
            id=self._id,
            bundle=request.bundle,
            rootfs=to_mounts(request.rootfs),
            terminal=request.stdio.terminal,
            stdin=request.stdio.stdin,
            stdout=request.stdio.stdout,
            stderr=request.stdio.stderr,
            checkpoint=request.checkpoint,
            options=to_any(request.options),
        )
        answer = await self._ask("Create", message, pb.CreateTaskResponse, _SLOW_S)
        return answer.pid

    async def start(self, exec_id: str) -> int:
        """As ``Shim.start``."""
        request = pb.StartRequest(id=self._id, exec_id=exec_id)
        return (await self._ask("Start", request, pb.StartResponse, _SLOW_S)).pid

    async def kill(self, exec_id: str, signal: int, *, every: bool = False) -> None:
        """As ``Shim.kill``."""
        request = pb.KillRequest(id=self._id, exec_id=exec_id, signal=signal, all=every)
        await self._ask("Kill", request, Empty, _QUICK_S)

    async def exec(self, exec_id: str, stdio: Stdio, spec: TypedValue) -> None:
        """As ``Shim.exec``."""
        request = pb.ExecProcessRequest(
            id=self._id,
            exec_id=exec_id,
            terminal=stdio.terminal,
            stdin=stdio.stdin,
            stdout=stdio.stdout,
            stderr=stdio.stderr,
            spec=to_any(spec),
        )
        await self._ask("Exec", request, Empty, _SLOW_S)

    async def wait(self, exec_id: str) -> ProcessExit:
        """As ``Shim.wait``."""
        request = pb.WaitRequest(id=self._id, exec_id=exec_id)
        answer = await self._ask("Wait", request, pb.WaitResponse, _WAIT_S)
        return ProcessExit(answer.exit_status, nanoseconds(answer.exited_at))

    async def delete(self, exec_id: str) -> ProcessExit:
        """As ``Shim.delete``."""
        request = pb.DeleteRequest(id=self._id, exec_id=exec_id)
        answer = await self._ask("Delete", request, pb.DeleteResponse, _SLOW_S)
        return ProcessExit(answer.exit_status, nanoseconds(answer.exited_at), answer.pid)

    async def state(self, exec_id: str) -> ProcessState:
        """As ``Shim.state``."""
        request = pb.StateRequest(id=self._id, exec_id=exec_id)
        answer = await self._ask("State", request, pb.StateResponse, _QUICK_S)
        return ProcessState(
            id=exec_id or self._id,
            pid=answer.pid,
            status=TaskStatus(answer.status),
            stdio=Stdio(answer.stdin, answer.stdout, answer.stderr, answer.terminal),
            exit_status=answer.exit_status,
            exited_at_ns=nanoseconds(answer.exited_at),
        )

    async def pids(self) -> list[ProcessInfo]:
        """As ``Shim.pids``."""
        request = pb.PidsRequest(id=self._id)
        answer = await self._ask("Pids", request, pb.PidsResponse, _QUICK_S)
        return [ProcessInfo(process.pid, from_any(process.info)) for process in answer.processes]

    async def pause(self) -> None:
        """As ``Shim.pause``."""
        await self._ask("Pause", pb.PauseRequest(id=self._id), Empty, _SLOW_S)

    async def resume(self) -> None:
        """As ``Shim.resume``."""
        await self._ask("Resume", pb.ResumeRequest(id=self._id), Empty, _SLOW_S)

    async def resize(self, exec_id: str, width: int, height: int) -> None:
        """As ``Shim.resize``."""
        request = pb.ResizePtyRequest(id=self._id, exec_id=exec_id, width=width, height=height)
        await self._ask("ResizePty", request, Empty, _QUICK_S)

    async def close_io(self, exec_id: str) -> None:
        """As ``Shim.close_io``."""
        request = pb.CloseIORequest(id=self._id, exec_id=exec_id, stdin=True)
        await self._ask("CloseIO", request, Empty, _QUICK_S)

    async def update(self, resources: TypedValue | None, annotations: Mapping[str, str]) -> None:
        """As ``Shim.update``."""
        request = pb.UpdateTaskRequest(
            id=self._id, resources=to_any(resources), annotations=dict(annotations)
        )
        await self._ask("Update", request, Empty, _SLOW_S)

    async def stats(self) -> TypedValue:
        """As ``Shim.stats``."""
        request = pb.StatsRequest(id=self._id)
        answer = await self._ask("Stats", request, pb.StatsResponse, _QUICK_S)
        value = from_any(answer.stats)
        if value is None:
            raise DataLoss(f"the shim of task '{self._id}' answered without figures")
        return value

    async def checkpoint(self, path: str, options: TypedValue | None) -> None:
        """As ``Shim.checkpoint``."""
        request = pb.CheckpointTaskRequest(id=self._id, path=path, options=to_any(options))
        await self._ask("Checkpoint", request, Empty, _SLOW_S)

    async def connect(self) -> ShimInfo:
        """As ``Shim.connect``."""
        request = pb.ConnectRequest(id=self._id)
        answer = await self._ask("Connect", request, pb.ConnectResponse, _SIGN_OF_LIFE_S)
        return ShimInfo(answer.shim_pid, answer.task_pid, answer.version)

    async def shutdown(self, *, now: bool = False) -> None:
        """As ``Shim.shutdown``."""
        request = pb.ShutdownRequest(id=self._id, now=now)
        await self._ask("Shutdown", request, Empty, _QUICK_S)
