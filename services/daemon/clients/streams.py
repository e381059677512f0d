"""Standard streams, through containerd to the shim."""

from __future__ import annotations

import asyncio
import json
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING

import grpc

from protos.theseus.shim.v1 import streams_pb2 as pb
from protos.theseus.shim.v1 import streams_pb2_grpc
from services.common.errors import Unavailable
from services.daemon.clients.connection import TIMEOUT_S, end_call
from services.daemon.containers.runtime import (
    CloseInput,
    Finished,
    Forgotten,
    Gap,
    Input,
    Output,
    ProcessEnd,
    Started,
    StreamKind,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from services.daemon.clients.connection import Connection
    from services.daemon.containers.runtime import AttachInput, AttachOutput, AttachTarget

    Call = grpc.aio.StreamStreamCall[pb.AttachRequest, pb.AttachResponse]

_KINDS = {pb.STREAM_KIND_STDERR: StreamKind.STDERR}


class ContainerdStreams:
    """:class:`services.daemon.containers.runtime.Streams` on containerd."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._stub = streams_pb2_grpc.StreamsStub(connection.channel)

    async def attach(
        self, target: AttachTarget, inputs: AsyncGenerator[AttachInput, None]
    ) -> AsyncGenerator[AttachOutput, None]:
        """See the interface."""
        with self._connection.calls():
            # Without a deadline: a session lasts as long as its process.
            call = self._stub.Attach()
            sending = asyncio.create_task(_send(call, target, inputs), name="attach-requests")
            try:
                # A read that is cancelled before that cancels the call's beginning, and then gRPC
                # has no end for it.
                await call.wait_for_connection()
                while (answer := await call.read()) is not grpc.aio.EOF:
                    if isinstance(answer, pb.AttachResponse):
                        output = _output(answer)
                        yield output
                        if isinstance(output, Finished):
                            if output.end is not None and await _forget(call, sending):
                                yield Forgotten()
                            return
                    if sending.done():
                        sending.result()
            finally:
                sending.cancel()
                await asyncio.gather(sending, return_exceptions=True)
                await end_call(call)
        raise Unavailable("the attached stream ended early: containerd or the shim is restarting")


async def _send(
    call: Call, target: AttachTarget, inputs: AsyncGenerator[AttachInput, None]
) -> None:
    # What is wrong with the call is told by the side that reads.
    with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
        await call.write(pb.AttachRequest(start=_start(target)))
        async with aclosing(inputs) as pieces:
            async for piece in pieces:
                await call.write(_request(piece))


async def _forget(call: Call, sending: asyncio.Task[None]) -> bool:
    """Have a process deleted that has ended; False where it is not known whether it was."""
    sending.cancel()
    await asyncio.gather(sending, return_exceptions=True)
    try:
        async with asyncio.timeout(TIMEOUT_S):
            await call.write(pb.AttachRequest(forget=pb.Forget()))
            while await call.read() is not grpc.aio.EOF:
                continue
            return await call.code() is grpc.StatusCode.OK
    except (grpc.aio.AioRpcError, asyncio.InvalidStateError, TimeoutError):
        return False


def _start(target: AttachTarget) -> pb.AttachStart:
    start = pb.AttachStart(
        container_id=target.container_id,
        exec_id=target.exec_id,
        offset=target.offset,
        from_end=target.from_end,
        output=target.output,
        input=target.input,
        exit=target.exit,
    )
    if (new := target.new) is not None:
        start.process.spec = json.dumps(new.process).encode()
        start.process.stdin, start.process.stdout = new.stdio.stdin, new.stdio.stdout
        start.process.stderr, start.process.terminal = new.stdio.stderr, new.stdio.terminal
    return start


def _request(piece: AttachInput) -> pb.AttachRequest:
    match piece:
        case Input():
            return pb.AttachRequest(input=pb.Input(offset=piece.offset, data=piece.data))
        case CloseInput():
            return pb.AttachRequest(close_input=pb.CloseInput())
        case _:
            return pb.AttachRequest(resize=pb.Resize(width=piece.width, height=piece.height))


def _output(answer: pb.AttachResponse) -> AttachOutput:
    match answer.WhichOneof("message"):
        case "started":
            started = answer.started
            return Started(started.input_offset, started.terminal, started.offset, started.pid)
        case "output":
            kind = _KINDS.get(answer.output.stream, StreamKind.STDOUT)
            return Output(answer.output.offset, kind, answer.output.data)
        case "gap":
            return Gap(getattr(answer.gap, "from"), answer.gap.to)
        case _:
            finished, end = answer.finished, None
            if finished.HasField("exit"):
                exited_at_ns = finished.exit.exited_at.ToNanoseconds()
                end = ProcessEnd(finished.exit.status, exited_at_ns)
            return Finished(finished.offset, end)
