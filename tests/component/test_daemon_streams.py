"""The daemon over its socket: attach, exec and logs, while the tiers come and go."""

from __future__ import annotations

import asyncio
import datetime
import json
from pathlib import Path

import grpc
import pytest

from protos.theseus.engine.v1 import containers_pb2 as pb
from services.common.rpc_errors import from_rpc_error
from tests.fakes.engine import engine

QUIET = {"network_mode": "none"}


@pytest.fixture
async def made():
    async with engine() as running:
        yield running


class Client:
    """An attached client."""

    def __init__(self, method, **start):
        self.call = method(timeout=30)
        self._start = pb.AttachStart(**{"output": True, **start})
        self.output = b""
        self.gaps = []

    async def begin(self):
        await self.call.write(pb.AttachRequest(start=self._start))
        first = await self.call.read()
        assert first.WhichOneof("message") == "started"
        return first.started

    async def send(self, data, offset):
        await self.call.write(pb.AttachRequest(input=pb.AttachInput(offset=offset, data=data)))

    async def until(self, length):
        while len(self.output) < length:
            answer = await self.call.read()
            assert answer.WhichOneof("message") == "output"
            assert answer.output.offset == self._start.offset + len(self.output)
            self.output += answer.output.data
        return self.output

    async def rest(self):
        """Read to the end; returns the length of the whole output."""
        while (answer := await self.call.read()).WhichOneof("message") == "output":
            self.output += answer.output.data
        assert answer.WhichOneof("message") == "finished"
        assert await self.call.read() is grpc.aio.EOF
        return answer.finished.offset


async def test_who_attaches_before_the_start_misses_nothing(made):
    identity = await made.create("one", tty=True, **QUIET)
    client = Client(made.containers.Attach, container="one")
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
    client = Client(made.containers.Attach, container="one")
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
    client = Client(made.containers.Attach, container="one")
    await client.begin()
    gate = made.node.gate_streams()
    await made.begin("one")
    assert gate.waiting
    client.call.cancel()


async def test_output_goes_on_where_it_was_after_containerd_returns(made):
    identity = await made.run("one", **QUIET)
    client = Client(made.containers.Attach, container="one")
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
    client = Client(made.containers.Attach, container="one", input=True)
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
    client = Client(made.containers.Attach, container="one", input=True)
    await client.begin()
    await client.send(b"abc", 0)
    await client.until(10)
    await made.until(lambda: bytes(made.node.world.process(identity).input) == b"abc")
    await made.restart()
    again = Client(made.containers.Attach, container="one", input=True, offset=8)
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
    client = Client(made.containers.Attach, container="one", from_end=True)
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
    client = Client(made.containers.Attach, container="one", offset=2)
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
    client = Client(made.containers.Attach, **start)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await client.begin()
    assert refused.value.code().name == code


async def test_an_attach_begins_with_a_start(made):
    call = made.containers.Attach(timeout=20)
    await call.write(pb.AttachRequest(close_input=pb.AttachCloseInput()))
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call.read()
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT


async def make_exec(made, **fields):
    request = pb.CreateExecRequest(**{"container": "one", "command": ["sh"], **fields})
    return (await made.execs.Create(request, timeout=20)).exec_id


async def start_exec(made, exec_id):
    return (await made.execs.Start(pb.StartExecRequest(exec_id=exec_id), timeout=20)).pid


async def wait_exec(made, exec_id):
    return (await made.execs.Wait(pb.WaitExecRequest(exec_id=exec_id), timeout=20)).exit


async def test_an_exec_runs_with_streams_and_exit_code(made):
    identity = await made.run("one", env=["A=1"], **QUIET)
    exec_id = await make_exec(
        made,
        env=["B=2"],
        user="bob",
        working_dir="/tmp",
        tty=True,
        width=80,
        height=25,
        open_stdin=True,
    )
    assert len(exec_id) == 64
    client = Client(made.execs.Attach, exec_id=exec_id, input=True)
    assert (await client.begin()).terminal
    assert await start_exec(made, exec_id) > 0
    process = made.node.world.process(identity, exec_id)
    assert process.stdio == ("theseus-stream:", "theseus-stream:", "")
    assert {"A=1", "B=2"} <= set(process.spec["env"])
    assert (process.spec["cwd"], process.spec["user"]["uid"]) == ("/tmp", 1000)
    assert process.spec["consoleSize"] == {"width": 80, "height": 25}
    await client.send(b"in", 0)
    made.node.world.write(identity, b"out", exec_id=exec_id)
    await client.until(3)
    made.node.world.end(identity, 5, exec_id)
    await client.rest()
    assert (await wait_exec(made, exec_id)).code == 5
    # Read by somebody and over: containerd need not keep it.
    await made.until(lambda: exec_id not in made.node.world.tasks[identity])


async def test_who_attached_to_an_exec_is_coupled_while_it_is_started(made):
    await made.run("one", **QUIET)
    exec_id = await make_exec(made)
    client = Client(made.execs.Attach, exec_id=exec_id)
    await client.begin()
    gate = made.node.gate_streams()
    release = made.node.block("Tasks.Start")
    starting = asyncio.create_task(start_exec(made, exec_id))
    await made.until(lambda: gate.waiting)  # and the start has not been answered
    gate.open.set()
    release.set()
    await starting
    container = (await made.get("one")).id
    made.node.world.write(container, b"out", exec_id=exec_id)
    made.node.world.end(container, 0, exec_id)
    await client.rest()
    assert client.output == b"out"


async def test_an_exec_that_cannot_be_started_ends_who_waits_for_its_streams(made):
    await made.run("one", **QUIET)
    exec_id = await make_exec(made)
    client = Client(made.execs.Attach, exec_id=exec_id)
    await client.begin()
    refused = grpc.StatusCode.FAILED_PRECONDITION
    made.node.fail("Tasks.Start", refused, "the runtime said no")
    made.node.refuse_streams("it has no streams")
    with pytest.raises(grpc.aio.AioRpcError):
        await start_exec(made, exec_id)
    assert await client.rest() == 0
    assert "the runtime said no" in (await wait_exec(made, exec_id)).error


def run_exec(made, **fields):
    request = pb.CreateExecRequest(**{"container": "one", "command": ["sh"], **fields})
    return made.execs.Run(pb.RunExecRequest(exec=request), timeout=20)


async def test_an_exec_is_run_in_one_call(made):
    identity = await made.run("one", **QUIET)
    call = run_exec(made, env=["B=2"])
    exec_id = (await call.read()).exec_id
    tasks = made.node.world.tasks[identity]
    await made.node.called("Tasks.Start", 2)
    assert "B=2" in tasks[exec_id].spec["env"]
    made.node.world.write(identity, b"out", exec_id=exec_id)
    made.node.world.write(identity, b"err", 2, exec_id=exec_id)
    answers = [(await call.read()).output for _ in range(2)]
    assert [(a.offset, a.stream, a.data) for a in answers] == [
        (0, pb.STREAM_KIND_STDOUT, b"out"),
        (3, pb.STREAM_KIND_STDERR, b"err"),
    ]
    made.node.world.end(identity, 5, exec_id)
    assert (await call.read()).exit.code == 5
    assert await call.read() is grpc.aio.EOF
    await made.until(lambda: exec_id not in tasks)
    # That it is deleted is recorded with the next one.
    await wait_exec(made, await make_exec_that_ends(made, identity))
    execs = made.app._below.execs
    assert execs.require(exec_id).deleted


async def make_exec_that_ends(made, identity):
    exec_id = await make_exec(made)
    await start_exec(made, exec_id)
    made.node.world.end(identity, 0, exec_id)
    return exec_id


async def test_an_exec_that_is_run_goes_on_when_its_client_goes_away(made):
    identity = await made.run("one", **QUIET)
    call = run_exec(made)
    exec_id = (await call.read()).exec_id
    made.node.block("Tasks.Start").set()
    await made.node.called("Tasks.Start", 2)
    made.node.world.write(identity, b"first", exec_id=exec_id)
    assert (await call.read()).output.data == b"first"
    call.cancel()
    made.node.world.write(identity, b"second", exec_id=exec_id)
    client = Client(made.execs.Attach, exec_id=exec_id, offset=5)
    await client.begin()
    assert await client.until(6) == b"second"
    made.node.world.end(identity, 7, exec_id)
    await client.rest()
    assert (await wait_exec(made, exec_id)).code == 7


@pytest.mark.parametrize(
    ("fields", "fault", "code"),
    [
        ({"open_stdin": True}, None, "INVALID_ARGUMENT"),
        ({"detach": True}, None, "INVALID_ARGUMENT"),
        ({"command": []}, None, "INVALID_ARGUMENT"),
        ({"container": "two"}, None, "NOT_FOUND"),
        ({}, ("INVALID_ARGUMENT", "COMMAND_NOT_FOUND", 1), "INVALID_ARGUMENT"),
        ({}, ("UNAVAILABLE", "", 5), "UNAVAILABLE"),
    ],
)
async def test_an_exec_that_cannot_be_run_is_refused(made, fields, fault, code):
    await made.run("one", **QUIET)
    if fault is not None:
        status, reason, times = fault
        made.node.refuse_streams("it has none")
        made.node.fail(
            "Tasks.Start", grpc.StatusCode[status], "refused", reason=reason, times=times
        )
    call = run_exec(made, **fields)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        while await call.read() is not grpc.aio.EOF:
            continue
    assert refused.value.code() == grpc.StatusCode[code]
    if fault is not None:
        assert from_rpc_error(refused.value).reason == fault[1]


async def test_a_detached_exec_throws_its_output_away(made):
    identity = await made.run("one", **QUIET)
    exec_id = await make_exec(made, detach=True)
    await start_exec(made, exec_id)
    assert made.node.world.process(identity, exec_id).stdio == ("", "", "")
    client = Client(made.execs.Attach, exec_id=exec_id)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await client.begin()
    assert refused.value.code() == grpc.StatusCode.FAILED_PRECONDITION


async def test_an_exec_is_waited_for_across_a_restart_of_the_daemon(made):
    identity = await made.run("one", **QUIET)
    running, ended = await make_exec(made), await make_exec(made)
    await start_exec(made, running)
    await start_exec(made, ended)
    await made.stop()
    made.node.world.end(identity, 3, ended)
    await made.start()
    assert (await wait_exec(made, ended)).code == 3
    waiting = asyncio.create_task(wait_exec(made, running))
    made.node.world.end(identity, 4, running)
    assert (await waiting).code == 4


async def test_an_exec_whose_command_is_not_there_says_so(made):
    identity = await made.run("one", **QUIET)
    exec_id = await make_exec(made)
    made.node.fail(
        "Tasks.Start", grpc.StatusCode.INVALID_ARGUMENT, "no such", reason="COMMAND_NOT_FOUND"
    )
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await start_exec(made, exec_id)
    assert from_rpc_error(failed.value).reason == "COMMAND_NOT_FOUND"
    status = await wait_exec(made, exec_id)
    assert (status.code, status.error) == (127, "no such")
    await made.until(lambda: exec_id not in made.node.world.tasks[identity])


async def test_the_end_of_a_container_ends_its_execs(made):
    identity = await made.run("one", **QUIET)
    exec_id = await make_exec(made)
    await start_exec(made, exec_id)
    made.node.world.end(identity, 0)
    status = await wait_exec(made, exec_id)
    assert status.lost
    assert "together with its container" in status.error


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"command": []}, "INVALID_ARGUMENT"),
        ({"command": [""]}, "INVALID_ARGUMENT"),
        ({"working_dir": "relative"}, "INVALID_ARGUMENT"),
        ({"env": ["=x"]}, "INVALID_ARGUMENT"),
        ({"container": "nobody"}, "NOT_FOUND"),
        ({"container": "stopped"}, "FAILED_PRECONDITION"),
    ],
)
async def test_an_exec_that_makes_no_sense_is_refused(made, fields, code):
    await made.run("one", **QUIET)
    await made.create("stopped", **QUIET)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await make_exec(made, **fields)
    assert refused.value.code().name == code


async def test_an_unknown_exec_is_not_found(made):
    for call in (start_exec, wait_exec):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call(made, "0" * 64)
        assert refused.value.code() == grpc.StatusCode.NOT_FOUND


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
