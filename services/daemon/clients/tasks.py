"""containerd's tasks."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from google.protobuf import any_pb2

from protos.containerd.services.tasks.v1 import tasks_pb2 as pb
from protos.containerd.services.tasks.v1 import tasks_pb2_grpc
from protos.containerd.types import mount_pb2
from protos.containerd.types.task import task_pb2
from protos.theseus.tasks.v1 import runs_pb2, runs_pb2_grpc
from services.common.errors import (
    AlreadyExists,
    FailedPrecondition,
    NotFound,
    Unimplemented,
)
from services.daemon.clients.connection import TIMEOUT_S
from services.daemon.clients.containers import PROCESS_TYPE, container_to_pb, runtime_options
from services.daemon.containers.runtime import TaskProcess, TaskStatus

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from services.daemon.clients.connection import Connection
    from services.daemon.containers.runtime import NewContainer, RootMount, Stdio

_CREATE_TIMEOUT_S = 60.0
_PROCESS_STATE = "PROCESS_STATE"  # a shim's reason: the process is past what was asked for
_STATUS = {
    task_pb2.CREATED: TaskStatus.CREATED,
    task_pb2.RUNNING: TaskStatus.RUNNING,
    task_pb2.STOPPED: TaskStatus.STOPPED,
    task_pb2.PAUSED: TaskStatus.PAUSED,
    task_pb2.PAUSING: TaskStatus.RUNNING,
}


class ContainerdTasks:
    """:class:`services.daemon.containers.runtime.Tasks` on containerd."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._stub = tasks_pb2_grpc.TasksStub(connection.channel)
        self._runs = runs_pb2_grpc.RunsStub(connection.channel)
        self._without_runs = False

    async def create(
        self, container_id: str, *, rootfs: Sequence[RootMount], stdio: Stdio, runtime: str
    ) -> int:
        """See the interface."""
        request = _create_request(container_id, rootfs, stdio, runtime)
        try:
            with self._connection.calls():
                answer = await self._stub.Create(request, timeout=_CREATE_TIMEOUT_S)
        except AlreadyExists:
            present = await self.get(container_id)
            if present.status is not TaskStatus.CREATED:
                raise
            return present.pid
        return answer.pid

    async def run(
        self, container: NewContainer, *, rootfs: Sequence[RootMount], stdio: Stdio
    ) -> int:
        """See the interface. A containerd that does not know it is asked once, until it goes."""
        if self._without_runs:
            raise Unimplemented(f"containerd at {self._connection.socket} runs nothing in one call")
        request = runs_pb2.RunRequest(
            container=container_to_pb(container),
            task=_create_request(container.id, rootfs, stdio, container.runtime),
        )
        try:
            with self._connection.calls():
                return (await self._runs.Run(request, timeout=_CREATE_TIMEOUT_S)).pid
        except Unimplemented:
            if not self._without_runs:  # of several calls under way the first one notes it
                self._without_runs = True
                self._connection.when_lost(self._ask_again)
            raise

    def _ask_again(self) -> None:
        self._without_runs = False

    async def start(self, container_id: str, exec_id: str = "") -> int:
        """See the interface."""
        request = pb.StartRequest(container_id=container_id, exec_id=exec_id)
        try:
            with self._connection.calls():
                answer = await self._stub.Start(request, timeout=_CREATE_TIMEOUT_S)
        except FailedPrecondition as error:
            if error.reason != _PROCESS_STATE:
                raise
            # An answer was lost and the call made again: it runs, or has run already.
            present = await self.get(container_id, exec_id)
            if present.status is TaskStatus.CREATED:
                raise
            return present.pid
        return answer.pid

    async def exec(
        self, container_id: str, exec_id: str, *, process: Mapping[str, Any], stdio: Stdio
    ) -> None:
        """See the interface."""
        request = pb.ExecProcessRequest(
            container_id=container_id,
            exec_id=exec_id,
            spec=any_pb2.Any(type_url=PROCESS_TYPE, value=json.dumps(process).encode()),
            stdin=stdio.stdin,
            stdout=stdio.stdout,
            stderr=stdio.stderr,
            terminal=stdio.terminal,
        )
        with self._connection.calls():
            await self._stub.Exec(request, timeout=_CREATE_TIMEOUT_S)

    async def kill(self, container_id: str, signal: int, exec_id: str = "") -> None:
        """See the interface."""
        request = pb.KillRequest(container_id=container_id, exec_id=exec_id, signal=signal)
        with self._connection.calls():
            await self._stub.Kill(request, timeout=TIMEOUT_S)

    async def resume(self, container_id: str) -> None:
        """See the interface."""
        with self._connection.calls():
            await self._stub.Resume(
                pb.ResumeTaskRequest(container_id=container_id), timeout=TIMEOUT_S
            )

    async def get(self, container_id: str, exec_id: str = "") -> TaskProcess:
        """See the interface."""
        request = pb.GetRequest(container_id=container_id, exec_id=exec_id)
        with self._connection.calls():
            answer = await self._stub.Get(request, timeout=TIMEOUT_S)
        return _process(answer.process)

    async def all(self) -> dict[str, TaskProcess]:
        """See the interface."""
        with self._connection.calls():
            answer = await self._stub.List(pb.ListTasksRequest(), timeout=TIMEOUT_S)
        return {process.id: _process(process) for process in answer.tasks}

    async def wait_end(self, container_id: str, exec_id: str = "", *, timeout_s: float) -> None:
        """See the interface."""
        request = pb.WaitRequest(container_id=container_id, exec_id=exec_id)
        with self._connection.calls():
            await self._stub.Wait(request, timeout=timeout_s)

    async def resize(self, container_id: str, width: int, height: int, exec_id: str = "") -> None:
        """See the interface."""
        request = pb.ResizePtyRequest(
            container_id=container_id, exec_id=exec_id, width=width, height=height
        )
        with self._connection.calls():
            await self._stub.ResizePty(request, timeout=TIMEOUT_S)

    async def delete(self, container_id: str, exec_id: str = "") -> None:
        """See the interface."""
        try:
            with self._connection.calls():
                if exec_id:
                    process = pb.DeleteProcessRequest(container_id=container_id, exec_id=exec_id)
                    await self._stub.DeleteProcess(process, timeout=TIMEOUT_S)
                else:
                    task = pb.DeleteTaskRequest(container_id=container_id)
                    await self._stub.Delete(task, timeout=TIMEOUT_S)
        except NotFound:
            return


def _create_request(
    container_id: str, rootfs: Sequence[RootMount], stdio: Stdio, runtime: str
) -> pb.CreateTaskRequest:
    return pb.CreateTaskRequest(
        container_id=container_id,
        rootfs=[
            mount_pb2.Mount(
                type=mount.type,
                source=mount.source,
                target=mount.target,
                options=mount.options,
            )
            for mount in rootfs
        ],
        stdin=stdio.stdin,
        stdout=stdio.stdout,
        stderr=stdio.stderr,
        terminal=stdio.terminal,
        options=runtime_options(runtime),
    )


def _process(message: task_pb2.Process) -> TaskProcess:
    return TaskProcess(
        pid=message.pid,
        status=_STATUS.get(message.status, TaskStatus.UNKNOWN),
        exit_code=message.exit_status,
        exited_at_ns=message.exited_at.ToNanoseconds(),
    )
