"""A shim's socket speaks ttrpc at once, and gRPC from the first client on that does."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos.containerd.task.v3 import shim_pb2
from protos.theseus.shim.v1 import control_pb2
from services.common import errors
from services.common.client import connect
from services.common.peer import Peer
from tests.fakes.eventually import eventually
from tests.fakes.shim_harness import plain_spec

INFO = "theseus.shim.v1.Control/Info"
STATE = "containerd.task.v3.Task/State"


@pytest.fixture
async def shim(maker):
    return await maker.start(maker.bundle(plain_spec("/bin/sleep", "1000")))


@pytest.fixture
async def peer(shim):
    peer = Peer(shim.request["socket"], namespace="test")
    yield peer
    await peer.close()


async def info(peer):
    return control_pb2.InfoResponse.FromString(await peer.call(INFO, b"", timeout_s=10))


def threads(shim):
    return len(list(Path(f"/proc/{shim.pid}/task").iterdir()))


def descriptors(shim):
    return len(list(Path(f"/proc/{shim.pid}/fd").iterdir()))


def sockets(shim):
    return sorted(path.name for path in Path(shim.request["socket"]).parent.iterdir())


async def test_containerd_alone_costs_no_grpc(shim, peer, fake):
    assert (await info(peer)).pid == shim.pid
    request = shim_pb2.StateRequest(id="nobody").SerializeToString()
    with pytest.raises(errors.NotFound):
        await peer.call(STATE, request, timeout_s=10)
    assert threads(shim) == 1


async def test_grpc_starts_with_its_first_client_and_ttrpc_goes_on(shim, peer):
    before = sockets(shim)
    first = await info(peer)
    assert await shim.info() == first
    assert threads(shim) > 1
    assert sockets(shim) == before
    assert await info(peer) == first


async def test_clients_that_come_at_the_same_moment_share_one_server(shim):
    channels = [connect(shim.request["socket"]) for _ in range(8)]
    stubs = [health_pb2_grpc.HealthStub(channel) for channel in channels]
    request = health_pb2.HealthCheckRequest(service="containerd.task.v3.Task")
    answers = await asyncio.gather(*(stub.Check(request, timeout=10) for stub in stubs))
    assert {answer.status for answer in answers} == {health_pb2.HealthCheckResponse.SERVING}
    for channel in channels:
        await channel.close()
    before = threads(shim)
    assert (await shim.info()).pid == shim.pid
    assert threads(shim) <= before + 1


async def test_nonsense_is_hung_up_on_and_silence_harms_nobody(shim, peer):
    loop = asyncio.get_running_loop()
    for nonsense in (b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00", b"PRI * HTTP/2.0 or so"):
        with socket.socket(socket.AF_UNIX) as client:
            client.setblocking(False)
            await loop.sock_connect(client, shim.request["socket"])
            await loop.sock_sendall(client, nonsense)
            async with asyncio.timeout(10):
                while await loop.sock_recv(client, 4096):
                    pass
    with socket.socket(socket.AF_UNIX) as silent:
        silent.connect(shim.request["socket"])
        assert (await info(peer)).pid == shim.pid


async def test_connections_that_have_gone_leave_no_descriptor(shim, peer):
    await shim.info()
    await info(peer)
    await peer.close()
    before = descriptors(shim)
    for _ in range(5):
        channel = connect(shim.request["socket"])
        check = health_pb2_grpc.HealthStub(channel).Check
        await check(health_pb2.HealthCheckRequest(), timeout=10)
        await channel.close()
        again = Peer(shim.request["socket"])
        assert (await info(again)).pid == shim.pid
        await again.close()
    await eventually(lambda: descriptors(shim) <= before)


async def test_its_end_takes_the_socket_away(shim, peer):
    await shim.info()
    await info(peer)
    await shim.shutdown(now=True)
    await shim.ended()
    assert not Path(shim.request["socket"]).exists()
    assert not any(name.startswith("waiting-") for name in sockets(shim))
