"""``containerd.services.tasks.v1.Tasks``: processes of containers."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import DecodeError

from protos.containerd.services.tasks.v1 import tasks_pb2 as pb
from protos.containerd.services.tasks.v1 import tasks_pb2_grpc
from protos.containerd.types import metrics_pb2
from protos.containerd.types.runc.options import oci_pb2
from protos.containerd.types.task import task_pb2
from services.common.errors import InvalidArgument, Unimplemented
from services.common.mounts import Mount
from services.common.server import request_namespace
from services.containerd import filters
from services.containerd.rpc.encoding import (
    from_any,
    from_descriptor,
    timestamp,
    to_any,
    to_descriptor,
)
from services.containerd.tasks.manager import TaskRequest
from services.containerd.tasks.shim import ProcessState, Stdio

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from google.protobuf.any_pb2 import Any as AnyMessage

    from services.common.draining import Draining
    from services.containerd.containers.store import ContainerStore
    from services.containerd.rpc.context import Context
    from services.containerd.tasks.checkpoints import Checkpoints
    from services.containerd.tasks.manager import TaskManager
    from services.containerd.tasks.shim import ProcessExit

_RESTORE_FROM_PATH = "RestoreFromPath"  # annotation of a checkpoint that is a directory already


class TasksService(tasks_pb2_grpc.TasksServicer):
    """Serves a task manager.

    Args:
        tasks: does the work.
        containers: for the spec that goes with a checkpoint.
        checkpoints: keeps checkpoints in the content store.
        draining: ends the waits when containerd stops.
    """

    def __init__(
        self,
        tasks: TaskManager,
        containers: ContainerStore,
        checkpoints: Checkpoints,
        draining: Draining,
    ) -> None:
        self._tasks = tasks
        self._containers = containers
        self._checkpoints = checkpoints
        self._draining = draining

    async def Create(
        self, request: pb.CreateTaskRequest, context: Context
    ) -> pb.CreateTaskResponse:
        """See the contract."""
        namespace = request_namespace(context)
        path = checked_options(request)
        async with AsyncExitStack() as stack:
            if request.HasField("checkpoint"):
                path = request.checkpoint.annotations.get(_RESTORE_FROM_PATH) or path
                if not path:
                    descriptor = from_descriptor(request.checkpoint)
                    restored = self._checkpoints.restored(namespace, descriptor)
                    path = str(await stack.enter_async_context(restored))
            pid = await self._tasks.create(
                namespace, request.container_id, task_request(request, path)
            )
        return pb.CreateTaskResponse(container_id=request.container_id, pid=pid)

    async def Start(self, request: pb.StartRequest, context: Context) -> pb.StartResponse:
        """See the contract."""
        pid = await self._tasks.start(
            request_namespace(context), request.container_id, request.exec_id
        )
        return pb.StartResponse(pid=pid)

    async def Delete(self, request: pb.DeleteTaskRequest, context: Context) -> pb.DeleteResponse:
        """See the contract."""
        end = await self._tasks.delete(request_namespace(context), request.container_id)
        return _deleted(end)

    async def DeleteProcess(
        self, request: pb.DeleteProcessRequest, context: Context
    ) -> pb.DeleteResponse:
        """See the contract."""
        end = await self._tasks.delete_process(
            request_namespace(context), request.container_id, request.exec_id
        )
        return _deleted(end, request.exec_id)

    async def Get(self, request: pb.GetRequest, context: Context) -> pb.GetResponse:
        """See the contract."""
        state = await self._tasks.get(
            request_namespace(context), request.container_id, request.exec_id
        )
        return pb.GetResponse(process=process_to_pb(state))

    async def List(self, request: pb.ListTasksRequest, context: Context) -> pb.ListTasksResponse:
        """See the contract. The filter is ignored, as upstream ignores it."""
        states = await self._tasks.states(request_namespace(context))
        return pb.ListTasksResponse(tasks=map(process_to_pb, states))

    async def Kill(self, request: pb.KillRequest, context: Context) -> Empty:
        """See the contract."""
        await self._tasks.kill(
            request_namespace(context),
            request.container_id,
            request.exec_id,
            request.signal,
            every=request.all,
        )
        return Empty()

    async def Exec(self, request: pb.ExecProcessRequest, context: Context) -> Empty:
        """See the contract."""
        await self._tasks.exec(
            request_namespace(context),
            request.container_id,
            request.exec_id,
            Stdio(request.stdin, request.stdout, request.stderr, request.terminal),
            from_any(request.spec),
        )
        return Empty()

    async def ResizePty(self, request: pb.ResizePtyRequest, context: Context) -> Empty:
        """See the contract."""
        await self._tasks.resize(
            request_namespace(context),
            request.container_id,
            request.exec_id,
            request.width,
            request.height,
        )
        return Empty()

    async def CloseIO(self, request: pb.CloseIORequest, context: Context) -> Empty:
        """See the contract."""
        await self._tasks.close_io(
            request_namespace(context), request.container_id, request.exec_id, stdin=request.stdin
        )
        return Empty()

    async def Pause(self, request: pb.PauseTaskRequest, context: Context) -> Empty:
        """See the contract."""
        await self._tasks.pause(request_namespace(context), request.container_id)
        return Empty()

    async def Resume(self, request: pb.ResumeTaskRequest, context: Context) -> Empty:
        """See the contract."""
        await self._tasks.resume(request_namespace(context), request.container_id)
        return Empty()

    async def ListPids(self, request: pb.ListPidsRequest, context: Context) -> pb.ListPidsResponse:
        """See the contract."""
        processes = await self._tasks.pids(request_namespace(context), request.container_id)
        return pb.ListPidsResponse(
            processes=[
                task_pb2.ProcessInfo(pid=process.pid, info=to_any(process.info))
                for process in processes
            ]
        )

    async def Checkpoint(
        self, request: pb.CheckpointTaskRequest, context: Context
    ) -> pb.CheckpointTaskResponse:
        """See the contract."""
        namespace = request_namespace(context)
        container = await self._containers.get(namespace, request.container_id)
        options = from_any(request.options)
        if path := _checkpoint_path(request.options):
            await self._tasks.checkpoint(namespace, request.container_id, path, options)
            return pb.CheckpointTaskResponse()
        async with self._checkpoints.directory() as directory:
            await self._tasks.checkpoint(namespace, request.container_id, str(directory), options)
            spec = to_any(container.spec)
            kept = await self._checkpoints.save(
                namespace, directory, b"" if spec is None else spec.SerializeToString()
            )
        return pb.CheckpointTaskResponse(descriptors=map(to_descriptor, kept))

    async def Update(self, request: pb.UpdateTaskRequest, context: Context) -> Empty:
        """See the contract."""
        await self._tasks.update(
            request_namespace(context),
            request.container_id,
            from_any(request.resources),
            dict(request.annotations),
        )
        return Empty()

    async def Metrics(self, request: pb.MetricsRequest, context: Context) -> pb.MetricsResponse:
        """See the contract."""
        namespace = request_namespace(context)
        found = await self._tasks.metrics(namespace, _wanted(request.filters, namespace))
        return pb.MetricsResponse(
            metrics=[
                metrics_pb2.Metric(timestamp=timestamp(collected), id=identity, data=to_any(data))
                for identity, collected, data in found
            ]
        )

    async def Wait(self, request: pb.WaitRequest, context: Context) -> pb.WaitResponse:
        """See the contract."""
        async with self._draining.endless():
            end = await self._tasks.wait(
                request_namespace(context), request.container_id, request.exec_id
            )
        return pb.WaitResponse(exit_status=end.exit_status, exited_at=timestamp(end.exited_at_ns))


def process_to_pb(state: ProcessState) -> task_pb2.Process:
    """A process' state on the wire."""
    return task_pb2.Process(
        id=state.id,
        pid=state.pid,
        status=task_pb2.Status.ValueType(state.status.value),
        stdin=state.stdio.stdin,
        stdout=state.stdio.stdout,
        stderr=state.stdio.stderr,
        terminal=state.stdio.terminal,
        exit_status=state.exit_status,
        exited_at=timestamp(state.exited_at_ns),
    )


def _deleted(end: ProcessExit, exec_id: str = "") -> pb.DeleteResponse:
    return pb.DeleteResponse(
        id=exec_id,
        pid=end.pid,
        exit_status=end.exit_status,
        exited_at=timestamp(end.exited_at_ns),
    )


def task_request(request: pb.CreateTaskRequest, checkpoint: str) -> TaskRequest:
    """What is asked for; ``checkpoint`` is the directory of one."""
    return TaskRequest(
        rootfs=tuple(
            Mount(mount.type, mount.source, mount.target, tuple(mount.options))
            for mount in request.rootfs
        ),
        stdio=Stdio(request.stdin, request.stdout, request.stderr, request.terminal),
        checkpoint=checkpoint,
        options=from_any(request.options),
        runtime=request.runtime_path,
    )


def checked_options(request: pb.CreateTaskRequest) -> str:
    """The directory of the checkpoint that runc's options name; empty for none."""
    if not request.HasField("options"):
        options = oci_pb2.Options()
    elif not request.options.type_url.endswith(oci_pb2.Options.DESCRIPTOR.full_name):
        raise InvalidArgument(
            f"options of type '{request.options.type_url}' are not "
            f"{oci_pb2.Options.DESCRIPTOR.full_name}",
            field="options",
        )
    else:
        try:
            options = oci_pb2.Options.FromString(request.options.value)
        except DecodeError as error:
            raise InvalidArgument("options do not parse", field="options") from error
    if request.task_api_address or options.task_api_address:
        raise Unimplemented("a task in a shim that somebody else started is not supported")
    return options.criu_image_path


def _checkpoint_path(message: AnyMessage) -> str:
    if not message.type_url:
        return ""
    name = oci_pb2.CheckpointOptions.DESCRIPTOR.full_name
    if not message.type_url.endswith(name):
        raise InvalidArgument(
            f"options of type '{message.type_url}' are not {name}", field="options"
        )
    try:
        return oci_pb2.CheckpointOptions.FromString(message.value).image_path
    except DecodeError as error:
        raise InvalidArgument("options do not parse", field="options") from error


def _wanted(expressions: Sequence[str], namespace: str) -> Callable[[str], bool]:
    wanted = filters.parse(expressions)

    def matches(identity: str) -> bool:
        fields = {"id": identity, "namespace": namespace}
        return wanted.matches(lambda path: fields.get(path[0]) if path else None)

    return matches
