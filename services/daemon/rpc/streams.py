"""Attach: between its messages and the data of the domain, for containers and execs alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

from protos.theseus.engine.v1 import containers_pb2 as pb
from services.common.errors import InvalidArgument
from services.daemon.containers.runtime import (
    AttachInput,
    AttachOutput,
    AttachTarget,
    CloseInput,
    Finished,
    Gap,
    Input,
    Output,
    Resize,
    Started,
    StreamKind,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

STREAM_KINDS = {
    StreamKind.STDOUT: pb.STREAM_KIND_STDOUT,
    StreamKind.STDERR: pb.STREAM_KIND_STDERR,
}


async def first_request(requests: AsyncIterator[pb.AttachRequest]) -> pb.AttachStart:
    """The start that every attach begins with.

    Raises:
        InvalidArgument: it begins with something else.
    """
    async for request in requests:
        if request.WhichOneof("message") == "start":
            return request.start
        break
    raise InvalidArgument("the first request of Attach has to be a start")


def target(start: pb.AttachStart) -> AttachTarget:
    """What a client wants to be coupled with."""
    return AttachTarget(
        container_id="",
        exec_id=start.exec_id,
        offset=start.offset,
        from_end=start.from_end,
        output=start.output,
        input=start.input,
    )


async def inputs(requests: AsyncIterator[pb.AttachRequest]) -> AsyncIterator[AttachInput]:
    """What follows the start.

    Raises:
        InvalidArgument: another start, or an empty message.
    """
    async for request in requests:
        match request.WhichOneof("message"):
            case "input":
                yield Input(request.input.offset, request.input.data)
            case "close_input":
                yield CloseInput()
            case "resize":
                yield Resize(request.resize.width, request.resize.height)
            case _:
                raise InvalidArgument("a request of Attach is a second start, or empty")


def output_to_pb(output: AttachOutput) -> pb.AttachResponse:
    """What a client is told."""
    match output:
        case Started():
            return pb.AttachResponse(
                started=pb.AttachStarted(
                    input_offset=output.input_offset,
                    terminal=output.terminal,
                    offset=output.offset,
                )
            )
        case Output():
            return pb.AttachResponse(
                output=pb.AttachOutput(
                    offset=output.offset, stream=STREAM_KINDS[output.stream], data=output.data
                )
            )
        case Gap():
            gap = pb.AttachGap(to=output.to_offset)
            setattr(gap, "from", output.from_offset)  # a word of Python
            return pb.AttachResponse(gap=gap)
        case _:
            assert isinstance(output, Finished)
            return pb.AttachResponse(finished=pb.AttachFinished(offset=output.offset))
