"""The daemon over its socket: attach and logs, while the tiers come and go."""

from __future__ import annotations

import asyncio
import datetime
import json
from pathlib import Path

import grpc
import pytest

from protos.theseus.engine.v1 import containers_pb2 as pb
from tests.fakes.attached_client import AttachedClient
from tests.fakes.engine import engine

QUIET = {"network_mode": "none"}


@pytest.fixture
async def made():
    async with engine() as running:
        yield running


async def test_who_attaches_before_the_start_misses_nothing(made):
    identity = await made.create("one", tty=True, **QUIET)
    client = AttachedClient(made.containers.Attach, container="one")
    started = await client.begin()
    assert (started.offset, started.input_offset, started.terminal) == (0, 0, True)
    await made.begin("one")
    made.node.world.write(identity, b"first ")
    made.node.world.write(identity, b"last", stream=2)
    made.node.world.end(identity, 0)
    assert await client.rest() == 10
    assert client.output == b"first last"


async def test_the_start_waits_until_who_attached_is_coupled(made):
    identity = await made.create("one", **QUIET)
    client = AttachedClient(made.containers.Attach, container="one")
    await client.begin()
    gate = made.node.gate_streams()
    starting = asyncio.create_task(made.begin("one"))
    await made.until(lambda: gate.waiting)
    assert made.node.calls.count("Tasks.Start") == 0
    gate.open.set()
    await starting
    made.node.world.end(identity, 0)
    await client.rest()


async def test_a_client_that_cannot_be_coupled_does_not_hold_up_the_start(made):
    await made.create("one", **QUIET)
    client = AttachedClient(made.containers.Attach, container="one")
    await client.begin()
    gate = made.node.gate_streams()
    await made.begin("one")
    assert gate.waiting
    client.call.cancel()


async def test_output_goes_on_where_it_was_after_containerd_returns(made):
    identity = await made.run("one", **QUIET)
    client = AttachedClient(made.containers.Attach, container="one")
    await client.begin()
    made.node.world.write(identity, b"before ")
    await client.until(7)
    await made.node.stop()
    made.node.world.write(identity, b"during ")
    await made.node.start()
    made.node.world.write(identity, b"after")
    await client.until(19)
    made.node.world.end(identity, 0)
    await client.rest()
    assert client.output == b"before during after"


async def test_input_is_sent_once_through_restarts(made):
    identity = await made.run("one", open_stdin=True, **QUIET)
    process = made.node.world.process(identity)
    client = AttachedClient(made.containers.Attach, container="one", input=True)
    await client.begin()
    await client.send(b"one ", 0)
    await made.until(lambda: process.input == b"one ")
    await made.node.stop()
    await client.send(b"two ", 4)
    await made.node.start()
    await client.send(b"three", 8)
    await client.call.write(pb.AttachRequest(resize=pb.AttachResize(width=80, height=25)))
    await client.call.write(pb.AttachRequest(close_input=pb.AttachCloseInput()))
    await made.until(lambda: process.input_closed)
    assert bytes(process.input) == b"one two three"
    assert process.sizes[-1] == (80, 25)
    client.call.cancel()


async def test_a_client_resumes_by_offset_after_the_daemon_returns(made):
    identity = await made.run("one", open_stdin=True, **QUIET)
    made.node.world.write(identity, b"0123456789")
    client = AttachedClient(made.containers.Attach, container="one", input=True)
    await client.begin()
    await client.send(b"abc", 0)
    await client.until(10)
    await made.until(lambda: bytes(made.node.world.process(identity).input) == b"abc")
    await made.restart()
    again = AttachedClient(made.containers.Attach, container="one", input=True, offset=8)
    started = await again.begin()
    assert (started.offset, started.input_offset) == (8, 3)
    await again.send(b"de", 3)
    await again.until(2)
    assert again.output == b"89"
    await made.until(lambda: bytes(made.node.world.process(identity).input) == b"abcde")
    made.node.world.end(identity, 0)
    assert await again.rest() == 10


async def test_from_the_end_comes_only_what_is_new(made):
    identity = await made.run("one", **QUIET)
    made.node.world.write(identity, b"old")
    client = AttachedClient(made.containers.Attach, container="one", from_end=True)
    assert (await client.begin()).offset == 3
    made.node.world.write(identity, b"new")
    client._start.offset = 3
    await client.until(3)
    assert client.output == b"new"
    client.call.cancel()


async def test_the_rest_of_a_finished_run_comes_from_the_log(made):
    identity = await made.run("one", **QUIET)
    made.node.world.end(identity, 0)
    await made.wait("one")
    await made.until(lambda: identity not in made.node.world.tasks)
    found = await made.get("one")
    seconds = found.started_at.ToNanoseconds() / 1e9 + 0.001
    log_line(found.log_path, "old run\n", seconds - 3600)
    log_line(found.log_path, "this ", seconds)
    log_line(found.log_path, "run\n", seconds, stream="stderr")
    client = AttachedClient(made.containers.Attach, container="one", offset=2)
    assert (await client.begin()).offset == 2
    assert await client.rest() == 9
    assert client.output == b"is run\n"


@pytest.mark.parametrize(
    ("start", "code"),
    [
        ({"container": "nobody"}, "NOT_FOUND"),
        ({"container": "one", "input": True}, "FAILED_PRECONDITION"),
        ({"container": "one", "output": False}, "INVALID_ARGUMENT"),
    ],
)
async def test_an_attach_that_makes_no_sense_is_refused(made, start, code):
    await made.run("one", **QUIET)
    client = AttachedClient(made.containers.Attach, **start)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await client.begin()
    assert refused.value.code().name == code


async def test_an_attach_begins_with_a_start(made):
    call = made.containers.Attach(timeout=20)
    await call.write(pb.AttachRequest(close_input=pb.AttachCloseInput()))
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call.read()
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def log_line(path, text, seconds, *, stream="stdout"):
    moment = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    line = {"log": text, "stream": stream, "time": moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ")}
    with Path(path).open("a") as file:
        file.write(json.dumps(line) + "\n")


async def read_log(made, **fields):
    call = made.containers.Logs(pb.LogsRequest(container="one", **fields), timeout=20)
    entries = []
    async for answer in call:
        entries += answer.entries
    return b"".join(entry.data for entry in entries)


async def test_logs_are_chosen_and_resumed(made):
    identity = await made.create("one", **QUIET)
    path = (await made.get("one")).log_path
    for number in range(5):
        stream = "stderr" if number % 2 else "stdout"
        log_line(path, f"line {number}\n", 1000.5 + number, stream=stream)
    assert await read_log(made) == b"".join(b"line %d\n" % n for n in range(5))
    assert await read_log(made, tail=2) == b"line 3\nline 4\n"
    assert await read_log(made, tail=0) == b""
    assert await read_log(made, stderr=True) == b"line 1\nline 3\n"
    assert await read_log(made, stdout=True, tail=1) == b"line 4\n"
    assert await read_log(made, offset=10) == b"e 1\nline 2\nline 3\nline 4\n"
    request = pb.LogsRequest()
    request.since.FromSeconds(1002)
    request.until.FromSeconds(1004)
    assert await read_log(made, since=request.since, until=request.until) == b"line 2\nline 3\n"
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await made.containers.Logs(pb.LogsRequest(container="nobody"), timeout=20).read()
    assert refused.value.code() == grpc.StatusCode.NOT_FOUND
    assert identity


async def test_logs_are_followed_to_the_end_of_the_run(made):
    identity = await made.run("one", **QUIET)
    path = (await made.get("one")).log_path
    call = made.containers.Logs(pb.LogsRequest(container="one", follow=True), timeout=20)
    log_line(path, "first\n", 1000)
    assert (await call.read()).entries[0].data == b"first\n"
    await made.node.restart()  # a reader of logs does not need containerd
    log_line(path, "second\n", 1001)
    assert (await call.read()).entries[0].data == b"second\n"
    log_line(path, "last\n", 1002)
    made.node.world.end(identity, 0)
    assert (await call.read()).entries[0].data == b"last\n"
    assert await call.read() is grpc.aio.EOF
