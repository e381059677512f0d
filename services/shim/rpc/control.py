"""Serves theseus.shim.v1.Control: metrics, identity, reopening of log files."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from protos.theseus.shim.v1 import control_pb2, control_pb2_grpc
from services.common import VERSION
from services.common.errors import FailedPrecondition, InvalidArgument, TheseusError

if TYPE_CHECKING:
    from collections.abc import Callable

    from grpc.aio import ServicerContext

    from services.shim.clients.registry import RegistryClient
    from services.shim.config import ShimConfig
    from services.shim.reexec import Reexecution
    from services.shim.tasks import Tasks

    Context = ServicerContext[Any, Any]


class ControlService(control_pb2_grpc.ControlServicer):
    """Control of one shim.

    Args:
        config: who it is.
        tasks: its containers.
        registry: its registration.
        page: renders the metrics.
        reexecution: replaces the program.
    """

    def __init__(
        self,
        config: ShimConfig,
        tasks: Tasks,
        registry: RegistryClient,
        page: Callable[[], bytes],
        reexecution: Reexecution,
    ) -> None:
        self._reexecution = reexecution
        self._config = config
        self._tasks = tasks
        self._registry = registry
        self._page = page

    async def Metrics(
        self, request: control_pb2.MetricsRequest, context: Context
    ) -> control_pb2.MetricsResponse:
        """The metrics page."""
        return control_pb2.MetricsResponse(text=self._page())

    async def Info(
        self, request: control_pb2.InfoRequest, context: Context
    ) -> control_pb2.InfoResponse:
        """Who this shim is."""
        return control_pb2.InfoResponse(
            namespace=self._config.namespace,
            id=self._config.id,
            instance_id=self._config.instance_id,
            pid=os.getpid(),
            version=VERSION,
            generation=self._reexecution.attempt.generation,
            runtime=await self._runtime(),
            epoch=self._registry.epoch,
            registered=self._registry.registered,
        )

    async def ReopenLog(
        self, request: control_pb2.ReopenLogRequest, context: Context
    ) -> control_pb2.ReopenLogResponse:
        """Open the log file of a container anew."""
        container = self._tasks.container(request.container_id)
        log_file = container.init.io.log if container.init.io is not None else None
        if log_file is None:
            raise FailedPrecondition(f"container '{container.id}' has no log file of the shim's")
        log_file.reopen()
        await log_file.settle()
        return control_pb2.ReopenLogResponse()

    async def Reexec(
        self, request: control_pb2.ReexecRequest, context: Context
    ) -> control_pb2.ReexecResponse:
        """Execute another version of the program in place."""
        if request.program and not request.program[0].startswith("/"):
            raise InvalidArgument("the program must be an absolute path", field="program")
        attempt = await self._reexecution.request(request.program, request.generation)
        return control_pb2.ReexecResponse(
            version=VERSION,
            generation=attempt.generation,
            pid=os.getpid(),
            downtime_us=attempt.downtime_us,
        )

    async def _runtime(self) -> str:
        containers = self._tasks.all()
        if not containers:
            return self._config.default_runtime
        runtime = containers[0].runtime
        try:
            return f"{runtime.name}: {await runtime.version()}"
        except TheseusError as error:
            return f"{runtime.name}: {error.message}"
