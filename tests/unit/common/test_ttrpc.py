"""Frames, server and client, over a socket pair or a socket in a directory."""

import asyncio
import socket
import struct

import pytest
from google.protobuf import empty_pb2, wrappers_pb2
from google.rpc import status_pb2

from protos.containerd.ttrpc import request_pb2
from services.common import errors, rpc_errors
from services.common.loop import Loop
from services.common.ttrpc import status
from services.common.ttrpc.client import CallFailed, TtrpcClient
from services.common.ttrpc.frames import (
    DATA,
    MESSAGE_MAX_BYTES,
    NO_DATA,
    REMOTE_CLOSED,
    REQUEST,
    RESPONSE,
    Frame,
    FrameBuffer,
    MessageTooLarge,
)
from services.common.ttrpc.server import CALLS_MAX, Method, TtrpcServer, methods
from tests.fakes.eventually import eventually

SERVICE = "test.Service"


class Handlers:
    """Methods on strings."""

    def __init__(self):
        self.started = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.release = asyncio.Event()

    async def echo(self, request):
        return request

    async def refuse(self, request):
        raise errors.NotFound(f"'{request.value}' does not exist")

    async def breaks(self, request):
        raise ZeroDivisionError

    async def wait(self, request):
        self.started.set()
        try:
            await self.release.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return request

    async def grow(self, request):
        return wrappers_pb2.StringValue(value="x" * (MESSAGE_MAX_BYTES + 1))

    def services(self):
        names = ("echo", "refuse", "breaks", "wait", "grow")
        return {SERVICE: {n: Method(wrappers_pb2.StringValue, getattr(self, n)) for n in names}}


@pytest.fixture
async def handlers():
    return Handlers()


@pytest.fixture
async def path(handlers, tmp_path):
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "s"))
    listener.listen()
    server = TtrpcServer(methods(handlers.services()))
    await server.start(listener)
    yield tmp_path / "s"
    await server.stop()


async def ask(client, method, value="", *, service=SERVICE, timeout_s=5.0):
    payload = wrappers_pb2.StringValue(value=value).SerializeToString()
    answer = await client.call(service, method, payload, timeout_s=timeout_s)
    return wrappers_pb2.StringValue.FromString(answer).value


async def read_frame(reader):
    head = await reader.readexactly(10)
    length, stream_id, kind, flags = struct.unpack(">IIBB", head)
    return Frame(stream_id, kind, await reader.readexactly(length), flags)


class Raw:
    """A connection on which frames are sent by hand."""

    def __init__(self, reader, writer):
        self.reader, self.writer = reader, writer

    def send(self, stream_id, method="echo", *, kind=REQUEST, flags=0, payload=None, **fields):
        if payload is None:
            request = request_pb2.Request(service=SERVICE, method=method, **fields)
            payload = request.SerializeToString()
        self.writer.write(Frame(stream_id, kind, payload, flags).pack())

    async def receive(self):
        frame = await read_frame(self.reader)
        assert (frame.kind, frame.flags) == (RESPONSE, 0)
        return frame.stream_id, request_pb2.Response.FromString(frame.payload).status


@pytest.fixture
async def raw(path):
    reader, writer = await asyncio.open_unix_connection(path)
    yield Raw(reader, writer)
    writer.close()


def test_a_frame_has_ten_bytes_of_header():
    frame = Frame(3, RESPONSE, b"payload", REMOTE_CLOSED | NO_DATA)
    assert frame.pack() == struct.pack(">IIBB", 7, 3, 2, 5) + b"payload"


def test_frames_are_read_whole_however_they_arrive():
    frames = [Frame(1, REQUEST, b"a" * 300), Frame(3, DATA), Frame(5, DATA, b"b")]
    data = b"".join(frame.pack() for frame in frames)
    for size in (1, 7, 10, 313, len(data)):
        buffer = FrameBuffer()
        pieces = [data[start : start + size] for start in range(0, len(data), size)]
        assert [frame for piece in pieces for frame in buffer.feed(piece)] == frames


def test_a_large_message_is_skipped_however_it_arrives():
    length = MESSAGE_MAX_BYTES + 1
    data = struct.pack(">IIBB", length, 7, REQUEST, 0) + bytes(length) + Frame(9, DATA).pack()
    for size in (1 << 16, len(data)):
        buffer = FrameBuffer()
        pieces = [data[start : start + size] for start in range(0, len(data), size)]
        error, frame = [found for piece in pieces for found in buffer.feed(piece)]
        assert isinstance(error, MessageTooLarge)
        assert (error.stream_id, frame) == (7, Frame(9, DATA))


def test_a_message_that_is_too_large_is_not_sent():
    with pytest.raises(MessageTooLarge):
        Frame(1, REQUEST, bytes(MESSAGE_MAX_BYTES + 1)).pack()


def test_status_codes_are_those_of_grpc():
    for kind, code in status.CODES.items():
        assert rpc_errors.code_of(kind("x")).value[0] == code
    assert len(set(status.CODES.values())) == len(status.CODES) == 16

    class Special(errors.NotFound):
        pass

    assert status.code_of(Special("x")) == 5
    assert status.code_of(errors.TheseusError("x")) == status.INTERNAL


async def test_calls_are_answered(path):
    async with await TtrpcClient.connect(path) as client:
        assert await ask(client, "echo", "one") == "one"
        big = "y" * 300_000
        assert await ask(client, "echo", big) == big


@pytest.mark.parametrize(
    ("call", "code", "words"),
    [
        ({"method": "refuse", "value": "x"}, 5, "'x' does not exist"),
        ({"method": "breaks"}, 13, "internal error in test.Service/breaks"),
        ({"method": "dance"}, 12, "method dance"),
        ({"method": "echo", "service": "no.Such"}, 12, "service no.Such"),
        ({"method": "grow"}, 8, "larger than"),
    ],
)
async def test_failures_are_statuses_and_the_connection_goes_on(path, call, code, words):
    async with await TtrpcClient.connect(path) as client:
        with pytest.raises(CallFailed, match=words) as caught:
            await ask(client, **call)
        assert caught.value.code == code
        assert await ask(client, "echo", "on") == "on"


async def test_a_call_ends_when_its_own_time_is_over(raw):
    raw.send(1, "wait", timeout_nano=1_000_000)
    stream_id, answer = await raw.receive()
    assert (stream_id, answer.code) == (1, status.DEADLINE_EXCEEDED)


async def test_calls_of_one_connection_run_at_the_same_time(raw, handlers):
    raw.send(1, "wait")
    await handlers.started.wait()
    raw.send(3, "echo")
    assert await raw.receive() == (3, status_pb2.Status())
    handlers.release.set()
    assert await raw.receive() == (1, status_pb2.Status())


async def test_calls_are_cancelled_when_the_peer_hangs_up(raw, handlers):
    raw.send(1, "wait")
    await handlers.started.wait()
    raw.writer.close()
    async with asyncio.timeout(5):
        await handlers.cancelled.wait()


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        ({"stream_id": 2}, "odd"),
        ({"stream_id": 1, "kind": DATA, "flags": REMOTE_CLOSED | NO_DATA}, "not active"),
        ({"stream_id": 1, "payload": b"\xff\xff"}, "cannot be decoded"),
    ],
)
async def test_what_the_protocol_forbids_is_refused(raw, frame, words):
    raw.send(**frame)
    stream_id, answer = await raw.receive()
    assert (stream_id, answer.code) == (frame["stream_id"], status.INVALID_ARGUMENT)
    assert words in answer.message
    raw.send(9)
    assert await raw.receive() == (9, status_pb2.Status())


async def test_a_stream_id_is_used_once(raw):
    raw.send(5)
    assert await raw.receive() == (5, status_pb2.Status())
    for again in (5, 3):
        raw.send(again)
        stream_id, answer = await raw.receive()
        assert (stream_id, answer.code) == (again, status.INVALID_ARGUMENT)


async def test_a_request_of_another_shape_is_refused(raw):
    request = request_pb2.Request(service=SERVICE, method="echo", payload=b"\xff\xff")
    raw.send(1, payload=request.SerializeToString())
    assert (await raw.receive())[1].code == status.INVALID_ARGUMENT


async def test_an_oversized_request_is_skipped(raw):
    length = MESSAGE_MAX_BYTES + 1
    raw.writer.write(struct.pack(">IIBB", length, 7, REQUEST, 0) + bytes(length))
    await raw.writer.drain()
    stream_id, answer = await raw.receive()
    assert (stream_id, answer.code) == (7, status.RESOURCE_EXHAUSTED)
    raw.send(9)
    assert await raw.receive() == (9, status_pb2.Status())


async def test_unknown_kinds_of_frames_are_ignored(raw):
    raw.send(1, kind=9)
    raw.send(1)
    assert await raw.receive() == (1, status_pb2.Status())


async def test_calls_under_way_are_bounded(raw, handlers):
    for number in range(CALLS_MAX + 1):
        raw.send(2 * number + 1, "wait")
    stream_id, answer = await raw.receive()
    assert (stream_id, answer.code) == (2 * CALLS_MAX + 1, status.RESOURCE_EXHAUSTED)


async def test_a_client_notices_that_its_peer_is_gone(tmp_path):
    async def hang_up(reader, writer):
        await read_frame(reader)
        writer.close()

    server = await asyncio.start_unix_server(hang_up, tmp_path / "s")
    async with await TtrpcClient.connect(tmp_path / "s") as client:
        with pytest.raises(ConnectionError, match="hung up"):
            await client.call("a", "b", b"", timeout_s=5)
    server.close()


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, Loop])
@pytest.mark.parametrize("said", ["answer", "gRPC"])
def test_what_a_peer_said_before_a_write_failed_is_heard(tmp_path, loop, said):
    """It hangs up between two frames of ours: the second cannot be sent, the answer is there."""

    async def scenario():
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(tmp_path / "s"))
            listener.listen()
            async with await TtrpcClient.connect(tmp_path / "s") as client:
                stream = client.stream("a", "b")
                server, _ = listener.accept()
                with server:
                    server.recv(65536)
                    status = status_pb2.Status(code=5, message="no such process")
                    answer = request_pb2.Response(status=status).SerializeToString()
                    http2_settings = b"\0\0\6\4" + bytes(11)
                    server.send(
                        http2_settings if said == "gRPC" else Frame(1, RESPONSE, answer).pack()
                    )
                await stream.send(b"x")
                with pytest.raises(ConnectionError if said == "gRPC" else CallFailed):
                    await stream.receive()
                assert client.broken
                assert client.alien == (said == "gRPC")

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(scenario())


async def test_a_client_gives_up_on_a_silent_peer(tmp_path):
    release = asyncio.Event()

    async def say_nothing(reader, writer):
        await release.wait()
        writer.close()

    server = await asyncio.start_unix_server(say_nothing, tmp_path / "s")
    async with await TtrpcClient.connect(tmp_path / "s") as client:
        with pytest.raises(TimeoutError):
            await client.call("a", "b", b"", timeout_s=0.01)
    release.set()
    server.close()


async def test_a_client_does_not_believe_garbage(tmp_path):
    async def garbage(reader, writer):
        frame = await read_frame(reader)
        writer.write(Frame(frame.stream_id + 2, RESPONSE, b"").pack())
        writer.write(Frame(frame.stream_id, RESPONSE, b"\xff\xff").pack())
        await writer.drain()
        writer.close()

    server = await asyncio.start_unix_server(garbage, tmp_path / "s")
    async with await TtrpcClient.connect(tmp_path / "s") as client:
        with pytest.raises(ConnectionError, match="cannot be decoded"):
            await client.call("a", "b", empty_pb2.Empty().SerializeToString(), timeout_s=5)
    server.close()


@pytest.mark.parametrize("loop", [asyncio.SelectorEventLoop, Loop])
@pytest.mark.parametrize("accepted", [True, False])
def test_a_server_that_ends_hangs_up_on_those_who_have_not_spoken_yet(tmp_path, loop, accepted):
    """They would wait for an answer that nobody gives, whether they speak later or not."""

    async def scenario():
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(tmp_path / "s"))
            listener.listen()
            server = TtrpcServer(methods(Handlers().services()))
            await server.start(listener)
            with socket.socket(socket.AF_UNIX) as client:
                client.setblocking(False)
                client.connect(str(tmp_path / "s"))
                if accepted:
                    await eventually(lambda: server._silent)
                await server.stop()
                running = asyncio.get_running_loop()
                try:
                    said = await asyncio.wait_for(running.sock_recv(client, 1), 5)
                except ConnectionResetError:
                    said = b""
                assert said == b""

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(scenario())
