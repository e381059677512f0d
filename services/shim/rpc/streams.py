"""Serves theseus.shim.v1.Streams: clients couple themselves with a process' streams."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from protos.theseus.shim.v1 import streams_pb2, streams_pb2_grpc
from services.common.errors import FailedPrecondition, InvalidArgument
from services.shim.process import Action
from services.shim.stdio.output import Gap
from services.shim.stdio.sink import STDERR, STDOUT

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from grpc.aio import ServicerContext

    from services.shim.process import Process
    from services.shim.stdio.input import Input
    from services.shim.stdio.output import Output, OutputReader, Piece
    from services.shim.stdio.process_io import ProcessIo
    from services.shim.tasks import Tasks

    Context = ServicerContext[Any, Any]
    Responses = AsyncIterator[streams_pb2.AttachResponse]

_KINDS = {
    STDOUT: streams_pb2.STREAM_KIND_STDOUT,
    STDERR: streams_pb2.STREAM_KIND_STDERR,
}


class StreamsService(streams_pb2_grpc.StreamsServicer):
    """Attach for all processes of a shim."""

    def __init__(self, tasks: Tasks) -> None:
        self._tasks = tasks

    async def Attach(
        self, request_iterator: AsyncIterator[streams_pb2.AttachRequest], context: Context
    ) -> Responses:
        """Couple the caller with a process; see the contract."""
        first = await anext(request_iterator, None)
        if first is None or first.WhichOneof("message") != "start":
            raise InvalidArgument("the first request of Attach must be a start")
        start = first.start
        process = self._tasks.container(start.container_id).process(start.exec_id)
        attachment = _Attachment(process, await process.streams(), start)
        try:
            async for response in attachment.run(request_iterator):
                yield response
        finally:
            attachment.close()


class _Attachment:
    """One attached client."""

    def __init__(self, process: Process, io: ProcessIo, start: streams_pb2.AttachStart) -> None:
        self._process = process
        self._io = io
        self._input = self._take_input() if start.input else None
        self._reader: OutputReader | None = None
        self._output: Output | None = self._io.output
        if start.output:
            self._reader = self._attach(start)

    async def run(self, requests: AsyncIterator[streams_pb2.AttachRequest]) -> Responses:
        """Serve the client to the end of the output, or of its requests if it wants none."""
        yield streams_pb2.AttachResponse(
            started=streams_pb2.Started(
                input_offset=self._input.taken if self._input else 0,
                terminal=self._process.stdio.terminal,
                offset=self._reader.offset if self._reader else 0,
            )
        )
        consumer = asyncio.create_task(self._consume(requests))
        try:
            if self._reader is None:
                await consumer
                return
            async for response in self._read(self._reader, consumer):
                yield response
        finally:
            consumer.cancel()
            await asyncio.gather(consumer, return_exceptions=True)

    def close(self) -> None:
        """Detach."""
        if self._reader is not None:
            self._reader.close()

    async def _read(self, reader: OutputReader, consumer: asyncio.Task[None]) -> Responses:
        while True:
            reading = asyncio.create_task(reader.read())
            try:
                # A bad request ends the call, even while there is nothing to send.
                while True:
                    if consumer.done():
                        consumer.result()
                    if reading.done():
                        break
                    waiting = {reading} if consumer.done() else {reading, consumer}
                    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            finally:
                reading.cancel()
            found = reading.result()
            if found is None:
                yield streams_pb2.AttachResponse(
                    finished=streams_pb2.Finished(offset=reader.offset)
                )
                return
            yield _response(found)
            reader.advance(found)

    async def _consume(self, requests: AsyncIterator[streams_pb2.AttachRequest]) -> None:
        async for request in requests:
            kind = request.WhichOneof("message")
            if kind == "input":
                if self._input is None:
                    raise FailedPrecondition("this client did not ask to write standard input")
                await self._input.write_at(self, request.input.offset, request.input.data)
            elif kind == "close_input":
                if self._input is None:
                    raise FailedPrecondition("this client did not ask to write standard input")
                self._input.end()
            elif kind == "resize":
                self._process.check(Action.RESIZE)
                self._io.resize(width=request.resize.width, height=request.resize.height)
            else:
                raise InvalidArgument("a request of Attach is empty, or a second start")

    def _take_input(self) -> Input:
        if not self._io.attachable_input or self._io.input is None:
            raise FailedPrecondition(
                f"standard input of process '{self._process.id}' cannot be attached to: its stdin "
                f"is '{self._process.stdio.stdin}', not theseus-stream:"
            )
        self._io.input.take_over(self)
        return self._io.input

    def _attach(self, start: streams_pb2.AttachStart) -> OutputReader:
        if self._output is None:
            raise FailedPrecondition(
                f"output of process '{self._process.id}' cannot be attached to: it goes to "
                f"'{self._process.stdio.stdout}', past the shim"
            )
        return self._output.attach(
            start.offset, from_end=start.from_end, follow=not start.no_follow
        )


def _response(found: Piece | Gap) -> streams_pb2.AttachResponse:
    if isinstance(found, Gap):
        gap = streams_pb2.Gap(to=found.end)
        setattr(gap, "from", found.start)  # a keyword of Python
        return streams_pb2.AttachResponse(gap=gap)
    return streams_pb2.AttachResponse(
        output=streams_pb2.Output(offset=found.offset, stream=_KINDS[found.stream], data=found.data)
    )
