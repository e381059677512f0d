"""The shim over gRPC: implements :class:`services.containerd.tasks.shim.Shim`."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import grpc

from protos.containerd.task.v3 import shim_pb2 as pb
from protos.containerd.task.v3 import shim_pb2_grpc
from protos.containerd.types import mount_pb2
from protos.theseus.shim.v1 import control_pb2, control_pb2_grpc
from services.common.client import connect
from services.common.errors import DataLoss, TheseusError, Unavailable
from services.common.rpc_errors import translated
from services.containerd.rpc.encoding import from_any, nanoseconds, to_any
from services.containerd.tasks.processes import ProcessId
from services.containerd.tasks.shim import (
    CreateTask,
    ProcessExit,
    ProcessInfo,
    ProcessState,
    ProgramInfo,
    Reexecuted,
    ShimAddress,
    ShimInfo,
    Stdio,
    TaskStatus,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from services.containerd.tasks.shim import Attachment, ShimRequest
    from services.containerd.typed import TypedValue

ATTACH_METHOD = "/theseus.shim.v1.Streams/Attach"

_QUICK_S = 30.0
_SLOW_S = 600.0  # what runs a runtime, with hooks that may take their time
_SIGN_OF_LIFE_S = 2.0
_WAIT_S = 24 * 3600.0


class ShimClient:
    """One shim's services on one channel, which connects when first used.

    Args:
        namespace: containerd's.
        container_id: whose task the shim runs.
        address: ``unix://PATH``.
    """

    def __init__(self, *, namespace: str, container_id: str, address: str) -> None:
        self._id = container_id
        self._channel = connect(address, namespace=namespace)
        self._task = shim_pb2_grpc.TaskStub(self._channel)
        self._control = control_pb2_grpc.ControlStub(self._channel)
        self._closed = False

    async def create(self, request: CreateTask) -> int:
        """As ``Shim.create``."""
        message = pb.CreateTaskRequest(
            id=self._id,
            bundle=request.bundle,
            rootfs=[
                mount_pb2.Mount(
                    type=mount.type,
                    source=mount.source,
                    target=mount.target,
                    options=mount.options,
                )
                for mount in request.rootfs
            ],
            terminal=request.stdio.terminal,
            stdin=request.stdio.stdin,
            stdout=request.stdio.stdout,
            stderr=request.stdio.stderr,
            checkpoint=request.checkpoint,
            options=to_any(request.options),
        )
        with self._call():
            return (await self._task.Create(message, timeout=_SLOW_S)).pid

    async def start(self, exec_id: str) -> int:
        """As ``Shim.start``."""
        with self._call():
            request = pb.StartRequest(id=self._id, exec_id=exec_id)
            return (await self._task.Start(request, timeout=_SLOW_S)).pid

    async def kill(self, exec_id: str, signal: int, *, every: bool = False) -> None:
        """As ``Shim.kill``."""
        with self._call():
            request = pb.KillRequest(id=self._id, exec_id=exec_id, signal=signal, all=every)
            await self._task.Kill(request, timeout=_QUICK_S)

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
        with self._call():
            await self._task.Exec(request, timeout=_SLOW_S)

    async def wait(self, exec_id: str) -> ProcessExit:
        """As ``Shim.wait``."""
        with self._call():
            request = pb.WaitRequest(id=self._id, exec_id=exec_id)
            answer = await self._task.Wait(request, timeout=_WAIT_S)
            return ProcessExit(answer.exit_status, nanoseconds(answer.exited_at))

    async def delete(self, exec_id: str) -> ProcessExit:
        """As ``Shim.delete``."""
        with self._call():
            request = pb.DeleteRequest(id=self._id, exec_id=exec_id)
            answer = await self._task.Delete(request, timeout=_SLOW_S)
            return ProcessExit(answer.exit_status, nanoseconds(answer.exited_at), answer.pid)

    async def state(self, exec_id: str) -> ProcessState:
        """As ``Shim.state``."""
        with self._call():
            request = pb.StateRequest(id=self._id, exec_id=exec_id)
            answer = await self._task.State(request, timeout=_QUICK_S)
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
        with self._call():
            answer = await self._task.Pids(pb.PidsRequest(id=self._id), timeout=_QUICK_S)
        return [ProcessInfo(process.pid, from_any(process.info)) for process in answer.processes]

    async def pause(self) -> None:
        """As ``Shim.pause``."""
        with self._call():
            await self._task.Pause(pb.PauseRequest(id=self._id), timeout=_SLOW_S)

    async def resume(self) -> None:
        """As ``Shim.resume``."""
        with self._call():
            await self._task.Resume(pb.ResumeRequest(id=self._id), timeout=_SLOW_S)

    async def resize(self, exec_id: str, width: int, height: int) -> None:
        """As ``Shim.resize``."""
        request = pb.ResizePtyRequest(id=self._id, exec_id=exec_id, width=width, height=height)
        with self._call():
            await self._task.ResizePty(request, timeout=_QUICK_S)

    async def close_io(self, exec_id: str) -> None:
        """As ``Shim.close_io``."""
        with self._call():
            request = pb.CloseIORequest(id=self._id, exec_id=exec_id, stdin=True)
            await self._task.CloseIO(request, timeout=_QUICK_S)

    async def update(self, resources: TypedValue | None, annotations: Mapping[str, str]) -> None:
        """As ``Shim.update``."""
        request = pb.UpdateTaskRequest(
            id=self._id, resources=to_any(resources), annotations=dict(annotations)
        )
        with self._call():
            await self._task.Update(request, timeout=_SLOW_S)

    async def stats(self) -> TypedValue:
        """As ``Shim.stats``."""
        with self._call():
            answer = await self._task.Stats(pb.StatsRequest(id=self._id), timeout=_QUICK_S)
        value = from_any(answer.stats)
        if value is None:
            raise DataLoss(f"the shim of task '{self._id}' answered without figures")
        return value

    async def checkpoint(self, path: str, options: TypedValue | None) -> None:
        """As ``Shim.checkpoint``."""
        request = pb.CheckpointTaskRequest(id=self._id, path=path, options=to_any(options))
        with self._call():
            await self._task.Checkpoint(request, timeout=_SLOW_S)

    async def connect(self) -> ShimInfo:
        """As ``Shim.connect``."""
        with self._call():
            request = pb.ConnectRequest(id=self._id)
            answer = await self._task.Connect(request, timeout=_SIGN_OF_LIFE_S)
            return ShimInfo(answer.shim_pid, answer.task_pid, answer.version)

    async def shutdown(self, *, now: bool = False) -> None:
        """As ``Shim.shutdown``."""
        with self._call():
            request = pb.ShutdownRequest(id=self._id, now=now)
            await self._task.Shutdown(request, timeout=_QUICK_S)

    async def host(self, request: ShimRequest) -> ShimAddress:
        """As ``Shim.host``."""
        message = control_pb2.HostRequest(
            namespace=request.namespace,
            id=request.id,
            bundle=str(request.bundle),
            instance_id=request.instance_id,
            adopt=request.adopt,
        )
        with self._call():
            answer = await self._control.Host(message, timeout=_QUICK_S)
        process = ProcessId(answer.pid, answer.pid_start_time)
        return ShimAddress(process, answer.address, answer.version)

    async def leave(self, *, now: bool = False) -> None:
        """As ``Shim.leave``."""
        with self._call():
            request = control_pb2.LeaveRequest(id=self._id, now=now)
            await self._control.Leave(request, timeout=_QUICK_S)

    async def info(self) -> ProgramInfo:
        """As ``Shim.info``."""
        with self._call():
            answer = await self._control.Info(control_pb2.InfoRequest(), timeout=_QUICK_S)
        return ProgramInfo(answer.version, answer.generation)

    async def reexec(self, program: Sequence[str], generation: int) -> Reexecuted:
        """As ``Shim.reexec``."""
        request = control_pb2.ReexecRequest(program=program, generation=generation)
        with self._call():
            answer = await self._control.Reexec(request, timeout=_SLOW_S)
        return Reexecuted(answer.version, answer.generation, answer.downtime_us)

    async def metrics(self) -> bytes:
        """As ``Shim.metrics``."""
        with self._call():
            request = control_pb2.MetricsRequest()
            return (await self._control.Metrics(request, timeout=_QUICK_S)).text

    def attach(self, requests: AsyncIterator[bytes], *, timeout_s: float | None) -> Attachment:
        """As ``Shim.attach``."""
        method: Any = self._channel.stream_stream(ATTACH_METHOD)  # no serializers: bytes both ways
        with self._call():
            return _Attachment(method(requests, timeout=timeout_s), self._call)

    async def close(self) -> None:
        """As ``Shim.close``: calls under way end with ``Unavailable``."""
        self._closed = True
        await self._channel.close()

    @contextmanager
    def _call(self) -> Iterator[None]:
        if self._is_closed():
            raise self._unavailable()
        try:
            with translated():
                yield
        except grpc.aio.UsageError as error:  # the channel was closed while the call began
            raise self._unavailable() from error
        except TheseusError:
            if _is_cancelled():  # the call's end came first; our caller has to see the other
                raise asyncio.CancelledError from None
            raise
        except asyncio.CancelledError:
            if not self._is_closed() or _is_cancelled():
                raise
            raise self._unavailable() from None  # the closed channel cancelled it, not our caller

    def _is_closed(self) -> bool:
        return self._closed

    def _unavailable(self) -> Unavailable:
        return Unavailable(f"the shim of task '{self._id}' went away during the call: try again")


class _Attachment:
    def __init__(self, call: Any, surround: Callable[[], AbstractContextManager[None]]) -> None:
        self._call = call
        self._surround = surround

    async def __aiter__(self) -> AsyncIterator[bytes]:
        with self._surround():
            async for response in self._call:
                yield response

    def cancel(self) -> None:
        self._call.cancel()


def _is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
