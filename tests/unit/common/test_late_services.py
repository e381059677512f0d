"""Services that are made for their first call."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from protos.containerd.services.namespaces.v1 import namespace_pb2, namespace_pb2_grpc
from services.common.client import connect
from services.common.late_services import LateServices
from services.common.metrics import ServerMetrics
from services.common.server import RpcServer, Service
from tests.fakes.eventually import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

NAME = namespace_pb2.DESCRIPTOR.services_by_name["Namespaces"].full_name


class Namespaces(namespace_pb2_grpc.NamespacesServicer):
    async def List(self, request: Any, context: Any) -> namespace_pb2.ListNamespacesResponse:
        return namespace_pb2.ListNamespacesResponse(namespaces=[namespace_pb2.Namespace(name="n")])


class Maker:
    """Makes the service, or fails; counts how often it was asked to."""

    def __init__(self) -> None:
        self.failures = 0
        self.asked = 0
        self.may_go_on = asyncio.Event()

    async def make(self) -> list[Service]:
        self.asked += 1
        await self.may_go_on.wait()
        if self.failures:
            self.failures -= 1
            raise ModuleNotFoundError("No module named 'secret'")
        add = namespace_pb2_grpc.add_NamespacesServicer_to_server
        descriptor = namespace_pb2.DESCRIPTOR.services_by_name["Namespaces"]
        return [Service(add, Namespaces(), descriptor)]


@asynccontextmanager
async def serving(directory: Path, maker: Maker) -> AsyncIterator[grpc.aio.Channel]:
    server = RpcServer(
        tier="test",
        socket=directory / "t.sock",
        metrics=ServerMetrics(),
        services=[],
        late=[LateServices([NAME], maker.make)],
    )
    await server.start()
    async with connect(directory / "t.sock") as channel:
        yield channel
    await server.stop(0)


async def names(channel: grpc.aio.Channel) -> list[str]:
    stub = namespace_pb2_grpc.NamespacesStub(channel)
    reply = await stub.List(namespace_pb2.ListNamespacesRequest(), timeout=10)
    return [namespace.name for namespace in reply.namespaces]


async def test_calls_wait_for_a_service_that_is_made_once(tmp_path: Path) -> None:
    maker = Maker()
    async with serving(tmp_path, maker) as channel:
        assert maker.asked == 0
        calls = [asyncio.create_task(names(channel)) for _ in range(3)]
        health = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service=NAME)
        answer = await health.Check(request, timeout=10)  # nothing else waits for it
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        maker.may_go_on.set()
        assert await asyncio.gather(*calls) == [["n"]] * 3
        assert await names(channel) == ["n"]
    assert maker.asked == 1


async def test_a_client_that_gives_up_takes_nobody_with_it(tmp_path: Path) -> None:
    maker = Maker()
    async with serving(tmp_path, maker) as channel:
        first = asyncio.create_task(names(channel))
        await eventually(lambda: maker.asked)
        second = asyncio.create_task(names(channel))
        first.cancel()
        maker.may_go_on.set()
        assert await second == ["n"]


async def test_one_that_fails_is_an_error_without_its_text_and_tried_again(tmp_path: Path) -> None:
    maker = Maker()
    maker.failures = 1
    maker.may_go_on.set()
    async with serving(tmp_path, maker) as channel:
        with pytest.raises(grpc.aio.AioRpcError, match="does not start: see the log") as caught:
            await names(channel)
        assert caught.value.code() is grpc.StatusCode.INTERNAL
        assert "secret" not in (caught.value.details() or "")
        assert await names(channel) == ["n"]
    assert maker.asked == 2


async def test_a_method_that_it_has_not_is_unimplemented(tmp_path: Path) -> None:
    maker = Maker()
    maker.may_go_on.set()
    async with serving(tmp_path, maker) as channel:
        for _ in range(2):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.unary_unary(f"/{NAME}/Rename")(b"", timeout=10)
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_reflection_knows_it(tmp_path: Path) -> None:
    maker = Maker()
    maker.may_go_on.set()
    async with serving(tmp_path, maker) as channel:
        call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(timeout=10)
        await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        answer = await call.read()
        await call.done_writing()
        assert NAME in {service.name for service in answer.list_services_response.service}
    assert maker.asked == 1
