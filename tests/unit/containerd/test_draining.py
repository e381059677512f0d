"""What a stop does to calls that may take for ever, and what request metadata does to handlers."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import grpc
import pytest
from google.protobuf.empty_pb2 import Empty
from prometheus_client import CollectorRegistry

from protos.containerd.services.tasks.v1 import tasks_pb2, tasks_pb2_grpc
from protos.theseus.shim.v1 import streams_pb2, streams_pb2_grpc
from services.common.client import connect
from services.common.metrics import ServerMetrics
from services.common.server import RpcServer, Service
from services.containerd.leases.lease import current_lease
from services.containerd.rpc.draining import DrainInterceptor
from services.containerd.rpc.leases import LeaseInterceptor
from tests.fakes.containerd import node_directory

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from services.containerd.rpc.context import Context


class Tasks(tasks_pb2_grpc.TasksServicer):
    def __init__(self) -> None:
        self.waiting = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.release = asyncio.Event()
        self.leases: list[str] = []

    async def Wait(
        self, request: tasks_pb2.WaitRequest, context: Context
    ) -> tasks_pb2.WaitResponse:
        self.leases.append(current_lease.get())
        if request.container_id == "ended":
            return tasks_pb2.WaitResponse(exit_status=42)
        self.waiting.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.cancelled.set()
        raise AssertionError

    async def Kill(self, request: tasks_pb2.KillRequest, context: Context) -> Empty:
        self.waiting.set()
        await self.release.wait()
        return Empty()


class Streams(streams_pb2_grpc.StreamsServicer):
    def __init__(self) -> None:
        self.cancelled = asyncio.Event()

    async def Attach(
        self, request_iterator: AsyncIterator[streams_pb2.AttachRequest], context: Context
    ) -> AsyncIterator[streams_pb2.AttachResponse]:
        yield streams_pb2.AttachResponse(
            output=streams_pb2.Output(data=current_lease.get().encode())
        )
        try:
            async for request in request_iterator:
                if request.HasField("close_input"):
                    return
        finally:
            self.cancelled.set()


class Served:
    def __init__(self) -> None:
        self.tasks, self.streams, self.drain = Tasks(), Streams(), DrainInterceptor()


@pytest.fixture
async def served() -> AsyncIterator[tuple[Served, grpc.aio.Channel]]:
    made = Served()
    async with node_directory() as directory:
        server = RpcServer(
            tier="test",
            socket=directory / "t.sock",
            services=[
                Service(
                    tasks_pb2_grpc.add_TasksServicer_to_server,
                    made.tasks,
                    tasks_pb2.DESCRIPTOR.services_by_name["Tasks"],
                ),
                Service(
                    streams_pb2_grpc.add_StreamsServicer_to_server,
                    made.streams,
                    streams_pb2.DESCRIPTOR.services_by_name["Streams"],
                ),
            ],
            metrics=ServerMetrics(CollectorRegistry()),
            interceptors=[LeaseInterceptor(), made.drain],
        )
        await server.start()
        async with connect(directory / "t.sock") as channel:
            yield made, channel
        await server.stop(0)


async def test_endless_calls_pass_when_nothing_stops(
    served: tuple[Served, grpc.aio.Channel],
) -> None:
    made, channel = served
    stub = tasks_pb2_grpc.TasksStub(channel)
    request = tasks_pb2.WaitRequest(container_id="ended")
    lease = [("containerd-lease", "l")]
    assert (await stub.Wait(request, timeout=5, metadata=lease)).exit_status == 42
    assert (await stub.Wait(request, timeout=5)).exit_status == 42
    assert made.tasks.leases == ["l", ""]
    attach = streams_pb2_grpc.StreamsStub(channel).Attach(timeout=5, metadata=lease)
    assert (await attach.read()).output.data == b"l"
    await attach.write(streams_pb2.AttachRequest(close_input=streams_pb2.CloseInput()))
    assert await attach.read() is grpc.aio.EOF
    assert await attach.code() is grpc.StatusCode.OK


async def test_a_drain_ends_endless_calls_with_unavailable_and_leaves_the_others(
    served: tuple[Served, grpc.aio.Channel],
) -> None:
    made, channel = served
    stub = tasks_pb2_grpc.TasksStub(channel)
    wait = stub.Wait(tasks_pb2.WaitRequest(container_id="x"), timeout=5)
    waiting = asyncio.ensure_future(_code(wait))
    attach = streams_pb2_grpc.StreamsStub(channel).Attach(timeout=5)
    await attach.read()
    await made.tasks.waiting.wait()
    made.tasks.waiting.clear()
    kill = stub.Kill(tasks_pb2.KillRequest(container_id="x"), timeout=5)
    killing = asyncio.ensure_future(_code(kill))
    await made.tasks.waiting.wait()
    made.drain.drain()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await attach.read()
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert await waiting is grpc.StatusCode.UNAVAILABLE
    await made.tasks.cancelled.wait()
    await made.streams.cancelled.wait()
    made.tasks.release.set()
    assert await killing is grpc.StatusCode.OK


async def test_a_caller_that_gives_up_cancels_the_handler(
    served: tuple[Served, grpc.aio.Channel],
) -> None:
    made, channel = served
    wait = tasks_pb2_grpc.TasksStub(channel).Wait(tasks_pb2.WaitRequest(), timeout=5)
    waiting = asyncio.ensure_future(_code(wait))
    await made.tasks.waiting.wait()
    wait.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    async with asyncio.timeout(5):
        await made.tasks.cancelled.wait()


async def _code(call: grpc.aio.UnaryUnaryCall) -> grpc.StatusCode:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK
