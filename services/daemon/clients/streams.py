"""Standard streams, through containerd to the shim."""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc

from protos.theseus.shim.v1 import streams_pb2 as pb
from protos.theseus.shim.v1 import streams_pb2_grpc
from services.common.errors import Unavailable
from services.daemon.containers.runtime import (
    CloseInput,
    Finished,
    Gap,
    Input,
    Output,
    Started,
    StreamKind,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from services.daemon.clients.connection import Connection
    from services.daemon.containers.runtime import AttachInput, AttachOutput, AttachTarget

_KINDS = {pb.STREAM_KIND_STDERR: StreamKind.STDERR}


class ContainerdStreams:
    """:class:`services.daemon.containers.runtime.Streams` on containerd."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._stub = streams_pb2_grpc.StreamsStub(connection.channel)

    async def attach(
        self, target: AttachTarget, inputs: AsyncIterator[AttachInput]
    ) -> AsyncIterator[AttachOutput]:
        """See the interface."""
        with self._connection.calls():
            # Without a deadline: a session lasts as long as its process.
            call = self._stub.Attach(_requests(target, inputs))
            try:
                while (answer := await call.read()) is not grpc.aio.EOF:
                    if isinstance(answer, pb.AttachResponse):
                        output = _output(answer)
                        yield output
                        if isinstance(output, Finished):
                            return
            finally:
                call.cancel()
        raise Unavailable("the attached stream ended early: containerd or the shim is restarting")


async def _requests(
    target: AttachTarget, inputs: AsyncIterator[AttachInput]
) -> AsyncIterator[pb.AttachRequest]:
    yield pb.AttachRequest(
        start=pb.AttachStart(
            container_id=target.container_id,
            exec_id=target.exec_id,
            offset=target.offset,
            from_end=target.from_end,
            output=target.output,
            input=target.input,
        )
    )
    async for piece in inputs:
        match piece:
            case Input(offset, data):
                yield pb.AttachRequest(input=pb.Input(offset=offset, data=data))
            case CloseInput():
                yield pb.AttachRequest(close_input=pb.CloseInput())
            case resize:
                yield pb.AttachRequest(resize=pb.Resize(width=resize.width, height=resize.height))


def _output(answer: pb.AttachResponse) -> AttachOutput:
    match answer.WhichOneof("message"):
        case "started":
            started = answer.started
            return Started(started.input_offset, started.terminal, started.offset)
        case "output":
            kind = _KINDS.get(answer.output.stream, StreamKind.STDOUT)
            return Output(answer.output.offset, kind, answer.output.data)
        case "gap":
            return Gap(getattr(answer.gap, "from"), answer.gap.to)
        case _:
            return Finished(answer.finished.offset)
