"""A service that was written for gRPC, served over ttrpc, and called by a peer over either."""

import asyncio

import pytest

from protos.containerd.services.namespaces.v1 import namespace_pb2, namespace_pb2_grpc
from protos.theseus.shim.v1 import streams_pb2, streams_pb2_grpc
from services.common import errors
from services.common.log import request_id
from services.common.metrics import ServerMetrics
from services.common.peer import Peer
from services.common.server import Methods, RpcServer, Service, request_namespace
from services.common.sockets import listen
from services.common.ttrpc.server import TtrpcServer
from services.common.ttrpc_handlers import Handlers

SERVICE = "containerd.services.namespaces.v1.Namespaces"
ATTACH = "theseus.shim.v1.Streams/Attach"


class Namespaces(namespace_pb2_grpc.NamespacesServicer):
    """Get fails as told; List answers with what the call carried; Delete takes for ever."""

    def __init__(self):
        self.failure = None
        self.waiting = asyncio.Event()
        self.cancelled = asyncio.Event()

    async def Get(self, request, context):
        if self.failure is not None:
            raise self.failure
        return namespace_pb2.GetNamespaceResponse(
            namespace=namespace_pb2.Namespace(name=request.name)
        )

    async def List(self, request, context):
        names = [request_id.get(), request_namespace(context)]
        return namespace_pb2.ListNamespacesResponse(
            namespaces=[namespace_pb2.Namespace(name=name) for name in names]
        )

    async def Delete(self, request, context):
        self.waiting.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise


class Streams(streams_pb2_grpc.StreamsServicer):
    """Echoes input; "fail" fails, "flood" is answered by 200 messages of 64 KiB."""

    def __init__(self):
        self.ended = asyncio.Event()
        self.sent = 0

    async def Attach(self, request_iterator, context):
        context.add_done_callback(lambda _: self.ended.set())
        async for request in request_iterator:
            data = request.input.data
            if data == b"fail":
                raise errors.NotFound("there is no such process", resource=("process", "p"))
            count = 200 if data == b"flood" else 1
            for _ in range(count):
                yield output(bytes(65536) if data == b"flood" else data)
                self.sent += 1


def output(data):
    return streams_pb2.AttachResponse(output=streams_pb2.Output(data=data))


def request(data):
    message = streams_pb2.AttachRequest(input=streams_pb2.Input(data=data))
    return message.SerializeToString()


async def received(stream):
    message = await stream.receive()
    return streams_pb2.AttachResponse.FromString(message).output.data


class Served:
    """The services on one socket, over one protocol or, after ``switch``, the other."""

    def __init__(self, path):
        self.path = path
        self.namespaces, self.streams = Namespaces(), Streams()
        self.metrics = ServerMetrics()
        self._server = None

    def _services(self):
        return [
            (namespace_pb2_grpc.add_NamespacesServicer_to_server, self.namespaces),
            (streams_pb2_grpc.add_StreamsServicer_to_server, self.streams),
        ]

    async def start(self, protocol):
        if protocol == "ttrpc":
            methods = Methods(self.metrics)
            for add, servicer in self._services():
                add(servicer, methods)
            self._server = TtrpcServer(Handlers(methods).answer)
            await self._server.start(listen(self.path, mode=0o600, backlog=128))
        else:
            descriptors = (
                namespace_pb2.DESCRIPTOR.services_by_name["Namespaces"],
                streams_pb2.DESCRIPTOR.services_by_name["Streams"],
            )
            self._server = RpcServer(
                tier="test",
                socket=self.path,
                metrics=self.metrics,
                services=[
                    Service(add, servicer, descriptor)
                    for (add, servicer), descriptor in zip(
                        self._services(), descriptors, strict=True
                    )
                ],
            )
            await self._server.start()

    async def stop(self):
        if self._server is not None:
            await self._server.stop(0)
            self._server = None


@pytest.fixture
async def served(tmp_path):
    served = Served(tmp_path / "s")
    yield served
    await served.stop()


@pytest.fixture
async def peer(served):
    peer = Peer(served.path, namespace="ns")
    yield peer
    await peer.close()


both = pytest.mark.parametrize("protocol", ["ttrpc", "grpc"])


async def get(peer, name="n", timeout_s=5.0):
    message = namespace_pb2.GetNamespaceRequest(name=name).SerializeToString()
    answer = await peer.call(f"{SERVICE}/Get", message, timeout_s=timeout_s)
    return namespace_pb2.GetNamespaceResponse.FromString(answer).namespace.name


@both
async def test_a_call_carries_namespace_and_request_id(served, peer, protocol):
    await served.start(protocol)
    token = request_id.set("r-1")
    answer = await peer.call(f"{SERVICE}/List", b"", timeout_s=5)
    request_id.reset(token)
    names = namespace_pb2.ListNamespacesResponse.FromString(answer).namespaces
    assert [each.name for each in names] == ["r-1", "ns"]
    assert 'grpc_method="List"' in "".join(served.metrics.lines())


@both
async def test_errors_arrive_as_they_were_raised(served, peer, protocol):
    await served.start(protocol)
    for raised in (
        errors.NotFound("no such thing", resource=("thing", "t")),
        errors.InvalidArgument("bad", field="name"),
        errors.ResourceExhausted("later", reason="full", retry_after_s=1.5),
        errors.DataLoss("it is lost"),
    ):
        served.namespaces.failure = raised
        with pytest.raises(type(raised)) as caught:
            await get(peer)
        for name in ("message", "field", "resource", "reason", "retry_after_s"):
            assert getattr(caught.value, name) == getattr(raised, name)
    served.namespaces.failure = ZeroDivisionError()
    with pytest.raises(errors.Internal, match="see the log for request"):
        await get(peer)


@both
async def test_what_is_not_served_is_unimplemented(served, peer, protocol):
    await served.start(protocol)
    with pytest.raises(errors.Unimplemented):
        await peer.call("theseus.No/Such", b"", timeout_s=5)


async def test_a_request_that_does_not_parse_and_one_of_the_wrong_kind_are_refused(served, peer):
    await served.start("ttrpc")
    with pytest.raises(errors.InvalidArgument, match="cannot be decoded"):
        await peer.call(f"{SERVICE}/Get", b"\xff", timeout_s=5)
    with pytest.raises(errors.InvalidArgument, match="takes a stream of requests"):
        await peer.call(ATTACH, b"", timeout_s=5)
    stream = await peer.stream(f"{SERVICE}/Get")
    with pytest.raises(errors.InvalidArgument, match="takes one request"):
        await stream.receive()
    stream.close()


@both
async def test_a_call_that_is_given_up_is_cancelled_at_its_server(served, peer, protocol):
    await served.start(protocol)
    call = asyncio.create_task(peer.call(f"{SERVICE}/Delete", b"", timeout_s=60))
    async with asyncio.timeout(5):
        await served.namespaces.waiting.wait()
        call.cancel()
        await served.namespaces.cancelled.wait()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert await get(peer, "still") == "still"


@both
async def test_a_call_has_its_time_limit(served, peer, protocol):
    await served.start(protocol)
    with pytest.raises(errors.DeadlineExceeded, match=r"did not answer|Deadline"):
        await peer.call(f"{SERVICE}/Delete", b"", timeout_s=0.05)
    async with asyncio.timeout(5):
        await served.namespaces.cancelled.wait()


@both
async def test_a_stream_goes_both_ways_until_the_client_has_no_more(served, peer, protocol):
    await served.start(protocol)
    await get(peer)
    stream = await peer.stream(ATTACH)
    for data in (b"one", b"", b"two"):
        await stream.send(request(data))
        assert await received(stream) == data
    await stream.end()
    assert await stream.receive() is None
    await stream.send(request(b"late"))  # of no effect
    stream.close()


@both
async def test_a_stream_ends_with_its_servers_error(served, peer, protocol):
    await served.start(protocol)
    await get(peer)
    stream = await peer.stream(ATTACH)
    await stream.send(request(b"one"))
    await stream.send(request(b"fail"))
    assert await received(stream) == b"one"
    with pytest.raises(errors.NotFound) as caught:
        await stream.receive()
    assert caught.value.resource == ("process", "p")
    stream.close()


@both
async def test_a_stream_that_is_closed_ends_at_its_server(served, peer, protocol):
    await served.start(protocol)
    await get(peer)
    stream = await peer.stream(ATTACH)
    await stream.send(request(b"one"))
    assert await received(stream) == b"one"
    stream.close()
    stream.close()
    async with asyncio.timeout(5):
        await served.streams.ended.wait()


async def test_a_stream_that_nobody_reads_holds_up_its_writer_and_nobody_else(served, peer):
    await served.start("ttrpc")
    stream = await peer.stream(ATTACH)
    await stream.send(request(b"flood"))
    assert await get(peer, "quick") == "quick"
    for _ in range(50):
        await asyncio.sleep(0)
    held_at = served.streams.sent
    assert held_at < 100  # 64 KiB each: what the sockets and the inbox take
    for _ in range(200):
        assert len(await received(stream)) == 65536
    stream.close()


@both
async def test_streams_break_with_their_server(served, peer, protocol):
    await served.start(protocol)
    await get(peer)
    stream = await peer.stream(ATTACH)
    await stream.send(request(b"one"))
    assert await received(stream) == b"one"
    await served.stop()
    with pytest.raises(errors.Unavailable):
        while await stream.receive() is not None:
            pass
    stream.close()


@both
async def test_nobody_is_there(served, peer, protocol):
    if protocol == "grpc":  # it was, once
        await served.start(protocol)
        assert await get(peer) == "n"
        await served.stop()
    with pytest.raises(errors.Unavailable):
        await get(peer)
    await served.start(protocol)
    assert await get(peer, "back") == "back"


async def test_a_peer_that_comes_back_in_time_is_found(served, peer):
    await served.start("ttrpc")
    await get(peer)
    await served.stop()
    call = asyncio.create_task(get(peer, "patience"))
    await asyncio.sleep(0)
    await served.start("ttrpc")
    assert await call == "patience"


async def test_a_peer_may_change_from_one_protocol_to_the_other_and_back(served, peer):
    for protocol in ("grpc", "ttrpc", "grpc"):
        await served.start(protocol)
        assert await get(peer, protocol) == protocol
        stream = await peer.stream(ATTACH)
        await stream.send(request(b"x"))
        assert await received(stream) == b"x"
        stream.close()
        await served.stop()


async def test_a_stream_towards_an_older_peer_fails_once_and_then_finds_it(served, peer):
    await served.start("grpc")
    stream = await peer.stream(ATTACH)
    await stream.send(request(b"x"))
    with pytest.raises(errors.Unavailable):
        await stream.receive()
    stream.close()
    stream = await peer.stream(ATTACH)
    await stream.send(request(b"x"))
    assert await received(stream) == b"x"
    stream.close()


@both
async def test_a_closed_peer_is_of_no_more_use(served, peer, protocol):
    await served.start(protocol)
    await get(peer)
    call = asyncio.create_task(peer.call(f"{SERVICE}/Delete", b"", timeout_s=60))
    await served.namespaces.waiting.wait()
    await peer.close()
    with pytest.raises(errors.Unavailable):
        await call
    with pytest.raises(errors.Unavailable):
        await get(peer)
    with pytest.raises(errors.Unavailable):
        await peer.stream(ATTACH)


async def test_a_message_that_is_too_large_is_refused(served, peer):
    await served.start("ttrpc")
    with pytest.raises(errors.InvalidArgument, match="larger than"):
        await get(peer, "x" * (5 << 20))
    stream = await peer.stream(ATTACH)
    with pytest.raises(errors.ResourceExhausted, match="larger than"):
        await stream.send(bytes(5 << 20))
    stream.close()


async def test_calls_get_time_to_finish_when_the_server_stops(served, peer):
    await served.start("ttrpc")
    call = asyncio.create_task(get(peer, "last"))
    await asyncio.sleep(0)
    server = served._server
    served._server = None
    await asyncio.sleep(0.01)
    await server.stop(5)
    assert await call == "last"
