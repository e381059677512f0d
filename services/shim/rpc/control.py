"""Serves theseus.shim.v1.Control: metrics, identity, members, re-execution."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from protos.theseus.shim.v1 import control_pb2, control_pb2_grpc
from services.common import VERSION, linux
from services.common.errors import FailedPrecondition, InvalidArgument, TheseusError
from services.shim.config import ShimConfig

if TYPE_CHECKING:
    from collections.abc import Callable

    from grpc.aio import ServicerContext

    from services.shim.members import Hosting, Members
    from services.shim.reexec import Reexecution
    from services.shim.tasks import Tasks

    Context = ServicerContext[Any, Any]


class ControlService(control_pb2_grpc.ControlServicer):
    """Control of one shim.

    Args:
        members: who it is.
        tasks: its containers.
        hosting: takes members in and sees them off.
        page: renders the metrics.
        reexecution: replaces the program.
    """

    def __init__(
        self,
        members: Members,
        tasks: Tasks,
        hosting: Hosting,
        page: Callable[[], bytes],
        reexecution: Reexecution,
    ) -> None:
        self._reexecution = reexecution
        self._members = members
        self._tasks = tasks
        self._hosting = hosting
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
        config, members = self._members.first.config, list(self._members)
        return control_pb2.InfoResponse(
            namespace=config.namespace,
            id=config.id,
            instance_id=config.instance_id,
            pid=os.getpid(),
            version=VERSION,
            generation=self._reexecution.attempt.generation,
            runtime=await self._runtime(),
            epoch=max(member.registry.epoch for member in members),
            registered=all(member.registry.registered for member in members),
            members=[member.config.id for member in members],
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

    async def Host(
        self, request: control_pb2.HostRequest, context: Context
    ) -> control_pb2.HostResponse:
        """Serve one more bundle."""
        config = replace(
            self._members.first.config,
            namespace=request.namespace,
            id=request.id,
            bundle=Path(request.bundle),
            instance_id=request.instance_id,
            adopt=request.adopt,
        )
        await self._hosting.host(ShimConfig.from_request(config.to_request()))
        return control_pb2.HostResponse(
            pid=os.getpid(),
            pid_start_time=linux.process_start_time(os.getpid()) or 0,
            address=f"unix://{config.socket}",
            version=VERSION,
        )

    async def Leave(
        self, request: control_pb2.LeaveRequest, context: Context
    ) -> control_pb2.LeaveResponse:
        """Serve a bundle no longer."""
        await self._hosting.leave(request.id, now=request.now)
        return control_pb2.LeaveResponse()

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
            return self._members.first.config.default_runtime
        runtime = containers[0].runtime
        try:
            return f"{runtime.name}: {await runtime.version()}"
        except TheseusError as error:
            return f"{runtime.name}: {error.message}"
