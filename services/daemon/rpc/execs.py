"""``theseus.engine.v1.Execs``."""

from __future__ import annotations

from contextlib import aclosing
from typing import TYPE_CHECKING

from protos.theseus.engine.v1 import containers_pb2 as pb
from protos.theseus.engine.v1 import containers_pb2_grpc
from services.daemon.containers.record import ExecConfig, ExitStatus
from services.daemon.containers.runtime import Gap, Output
from services.daemon.rpc import messages, streams

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from services.common.draining import Draining
    from services.daemon.containers.attach import Attacher
    from services.daemon.containers.exec import Execs
    from services.daemon.containers.exec_run import ExecRuns, Told
    from services.daemon.rpc.context import Context


class ExecsService(containers_pb2_grpc.ExecsServicer):
    """Serves exec sessions."""

    def __init__(
        self, execs: Execs, runs: ExecRuns, attacher: Attacher, draining: Draining
    ) -> None:
        self._execs = execs
        self._runs = runs
        self._attacher = attacher
        self._draining = draining

    async def Create(
        self, request: pb.CreateExecRequest, context: Context
    ) -> pb.CreateExecResponse:
        """See the contract."""
        exec_id = await self._execs.create(request.container, _config(request))
        return pb.CreateExecResponse(exec_id=exec_id)

    async def Start(self, request: pb.StartExecRequest, context: Context) -> pb.StartExecResponse:
        """See the contract."""
        return pb.StartExecResponse(pid=await self._execs.start(request.exec_id))

    async def Wait(self, request: pb.WaitExecRequest, context: Context) -> pb.WaitExecResponse:
        """See the contract."""
        async with self._draining.endless():
            status = await self._execs.wait(request.exec_id)
        return pb.WaitExecResponse(exit=messages.exit_to_pb(status))

    async def Attach(
        self, request_iterator: AsyncIterator[pb.AttachRequest], context: Context
    ) -> AsyncIterator[pb.AttachResponse]:
        """See the contract."""
        start = await streams.first_request(request_iterator)
        self._execs.attached(start.exec_id)
        session = self._attacher.exec(streams.target(start), streams.inputs(request_iterator))
        async with self._draining.endless(), aclosing(session) as outputs:
            async for output in outputs:
                yield streams.output_to_pb(output)

    async def Run(
        self, request: pb.RunExecRequest, context: Context
    ) -> AsyncIterator[pb.RunExecResponse]:
        """See the contract."""
        run = self._runs.run(request.exec.container, _config(request.exec))
        async with self._draining.endless(), aclosing(run) as told:
            async for piece in told:
                yield _told_to_pb(piece)


def _config(request: pb.CreateExecRequest) -> ExecConfig:
    return ExecConfig(
        command=tuple(request.command),
        env=tuple(request.env),
        working_dir=request.working_dir,
        user=request.user,
        tty=request.tty,
        open_stdin=request.open_stdin,
        privileged=request.privileged,
        detach=request.detach,
        width=request.width,
        height=request.height,
    )


def _told_to_pb(piece: Told) -> pb.RunExecResponse:
    match piece:
        case Output():
            return pb.RunExecResponse(output=streams.output_to_pb(piece).output)
        case Gap():
            return pb.RunExecResponse(gap=streams.output_to_pb(piece).gap)
        case ExitStatus():
            return pb.RunExecResponse(exit=messages.exit_to_pb(piece))
        case _:
            return pb.RunExecResponse(exec_id=piece)
