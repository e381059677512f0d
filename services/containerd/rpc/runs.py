"""``theseus.tasks.v1.Runs``: record, task and start of a container in one call."""

from __future__ import annotations

from typing import TYPE_CHECKING

from protos.theseus.tasks.v1 import runs_pb2 as pb
from protos.theseus.tasks.v1 import runs_pb2_grpc
from services.common.errors import AlreadyExists, InvalidArgument, NotFound
from services.common.server import request_namespace
from services.containerd.rpc import containers, tasks
from services.containerd.tasks.shim import TaskStatus

if TYPE_CHECKING:
    from collections.abc import Callable

    from services.containerd.containers.store import Container, ContainerStore
    from services.containerd.rpc.context import Context
    from services.containerd.tasks.manager import TaskManager


class RunsService(runs_pb2_grpc.RunsServicer):
    """Does what the three calls do that clients of containerd make.

    Args:
        store: has the records.
        manager: has the tasks.
        announced: called when there is to be a task.
    """

    def __init__(
        self, store: ContainerStore, manager: TaskManager, announced: Callable[[], None]
    ) -> None:
        self._store = store
        self._tasks = manager
        self._announced = announced

    async def Run(self, request: pb.RunRequest, context: Context) -> pb.RunResponse:
        """See the contract."""
        if request.task.HasField("checkpoint") or tasks.checked_options(request.task):
            raise InvalidArgument("a run begins anew, not from a checkpoint", field="task")
        namespace, container = request_namespace(context), containers.from_pb(request.container)
        self._announced()
        try:
            await self._store.create(namespace, container)
        except AlreadyExists:
            return pb.RunResponse(pid=await self._again(namespace, container, request))
        return pb.RunResponse(pid=await self._begin(namespace, container, request))

    async def _begin(self, namespace: str, container: Container, request: pb.RunRequest) -> int:
        await self._tasks.create(namespace, container.id, tasks.task_request(request.task, ""))
        return await self._tasks.start(namespace, container.id)

    async def _again(self, namespace: str, container: Container, request: pb.RunRequest) -> int:
        """A record is there: of this call, made before, or of an earlier run."""
        try:
            task = await self._tasks.get(namespace, container.id)
        except NotFound:
            await self._store.delete(namespace, container.id)
            await self._store.create(namespace, container)
            return await self._begin(namespace, container, request)
        if task.status is TaskStatus.CREATED:
            return await self._tasks.start(namespace, container.id)
        return task.pid
