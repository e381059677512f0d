"""Serves theseus.shim.v1.Streams: clients couple themselves with a process' streams."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from protos.theseus.shim.v1 import streams_pb2, streams_pb2_grpc
from services.common.errors import DataLoss, FailedPrecondition, InvalidArgument
from services.shim.process import Action
from services.shim.rpc.task_api import exit_time, json_object
from services.shim.stdio.output import Gap
from services.shim.stdio.sink import STDERR, STDOUT
from services.shim.stdio.uris import Stdio

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from grpc.aio import ServicerContext

    from services.shim.container import Container
    from services.shim.process import ExitRecord, Process
    from services.shim.rpc.gate import Gate
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
    """Attach for all processes of a shim.

    Args:
        tasks: theirs.
        gate: holds back what would start a process.
    """

    def __init__(self, tasks: Tasks, gate: Gate) -> None:
        self._tasks = tasks
        self._gate = gate

    async def Attach(
        self, request_iterator: AsyncIterator[streams_pb2.AttachRequest], context: Context
    ) -> Responses:
        """Couple the caller with a process; see the contract."""
        first = await anext(request_iterator, None)
        if first is None or first.WhichOneof("message") != "start":
            raise InvalidArgument("the first request of Attach must be a start")
        start = first.start
        container = self._tasks.container(start.container_id)
        if start.HasField("process"):
            process = await self._run(container, start)
        else:
            process = container.process(start.exec_id)

        async def forget() -> None:
            if process is container.init:
                raise FailedPrecondition("only an exec process is forgotten by its streams")
            await self._tasks.delete(container, process)

        attachment = _Attachment(process, await process.streams(), start, forget)
        try:
            async for response in attachment.run(request_iterator):
                yield response
        finally:
            attachment.close()

    async def _run(self, container: Container, start: streams_pb2.AttachStart) -> Process:
        wanted = start.process
        spec = json_object(wanted.spec, field="start.process.spec")
        stdio = Stdio(wanted.stdin, wanted.stdout, wanted.stderr, wanted.terminal)
        async with self._gate.inside():
            return await self._tasks.run_exec(container, start.exec_id, spec, stdio)


class _Attachment:
    """One attached client."""

    def __init__(
        self,
        process: Process,
        io: ProcessIo,
        start: streams_pb2.AttachStart,
        forget: Callable[[], Awaitable[None]],
    ) -> None:
        self._process = process
        self._io = io
        self._forget = forget
        self._tells_exit = start.exit
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
                pid=self._process.pid,
            )
        )
        consumer = asyncio.create_task(self._consume(requests))
        try:
            if self._reader is None:
                await consumer
                return
            async for response in self._read(self._reader, consumer):
                yield response
            yield await self._finished(self._reader, consumer)
            if self._tells_exit:
                await consumer  # to a Forget, or the end of requests
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
                await _unless_failed(reading, consumer)
            finally:
                reading.cancel()
            found = reading.result()
            if found is None:
                return
            yield _response(found)
            reader.advance(found)

    async def _finished(
        self, reader: OutputReader, consumer: asyncio.Task[None]
    ) -> streams_pb2.AttachResponse:
        ended: streams_pb2.Exit | None = None
        if self._tells_exit:
            with suppress(DataLoss):  # nobody knows it
                record = await self._ended(consumer)
                ended = streams_pb2.Exit(status=record.status, exited_at=exit_time(record))
        return streams_pb2.AttachResponse(
            finished=streams_pb2.Finished(offset=reader.offset, exit=ended)
        )

    async def _ended(self, consumer: asyncio.Task[None]) -> ExitRecord:
        ending = asyncio.ensure_future(self._process.wait())
        try:
            await _unless_failed(ending, consumer)
        finally:
            ending.cancel()
        return ending.result()

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
            elif kind == "forget":
                await self._forget()
                return
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


async def _unless_failed(work: asyncio.Future[Any], consumer: asyncio.Task[None]) -> None:
    """Wait for ``work``; a bad request ends the call, even while there is nothing to send."""
    while True:
        if consumer.done():
            consumer.result()
        if work.done():
            return
        waiting = {work} if consumer.done() else {work, consumer}
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)


def _response(found: Piece | Gap) -> streams_pb2.AttachResponse:
    if isinstance(found, Gap):
        gap = streams_pb2.Gap(to=found.end)
        setattr(gap, "from", found.start)  # a keyword of Python
        return streams_pb2.AttachResponse(gap=gap)
    return streams_pb2.AttachResponse(
        output=streams_pb2.Output(offset=found.offset, stream=_KINDS[found.stream], data=found.data)
    )
