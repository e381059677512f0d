"""The daemon over its socket: execs, while the tiers come and go."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from protos.theseus.engine.v1 import containers_pb2 as pb
from services.common.rpc_errors import from_rpc_error
from services.daemon.containers.record import ExecConfig, ExecState
from tests.fakes.attached_client import AttachedClient
from tests.fakes.engine import engine

QUIET = {"network_mode": "none"}


@pytest.fixture(params=["in one stream", "by steps"])
async def made(request):
    """A daemon over shims of this version, and of one that knows no exec in one stream."""
    async with engine() as running:
        running.node.older = request.param == "by steps"
        # What starts an exec, and how often that was called once the first one is.
        running.node.starts_exec = ("Tasks.Start", 2) if running.node.older else ("Streams.Run", 1)
        yield running


@pytest.fixture
async def newer():
    """A daemon over shims of this version."""
    async with engine() as running:
        yield running


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
    client = AttachedClient(made.execs.Attach, exec_id=exec_id, input=True)
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


async def test_who_attached_to_an_exec_is_coupled_while_an_older_shim_starts_it(made):
    made.node.older = True
    await made.run("one", **QUIET)
    exec_id = await make_exec(made)
    client = AttachedClient(made.execs.Attach, exec_id=exec_id)
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
    client = AttachedClient(made.execs.Attach, exec_id=exec_id)
    await client.begin()
    refused = grpc.StatusCode.FAILED_PRECONDITION
    made.node.fail(made.node.starts_exec[0], refused, "the runtime said no")
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
    await made.node.called(*made.node.starts_exec)
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
    made.node.block(made.node.starts_exec[0]).set()
    await made.node.called(*made.node.starts_exec)
    made.node.world.write(identity, b"first", exec_id=exec_id)
    assert (await call.read()).output.data == b"first"
    call.cancel()
    made.node.world.write(identity, b"second", exec_id=exec_id)
    client = AttachedClient(made.execs.Attach, exec_id=exec_id, offset=5)
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
            made.node.starts_exec[0],
            grpc.StatusCode[status],
            "refused",
            reason=reason,
            times=times,
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
    client = AttachedClient(made.execs.Attach, exec_id=exec_id)
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
        made.node.starts_exec[0],
        grpc.StatusCode.INVALID_ARGUMENT,
        "no such",
        reason="COMMAND_NOT_FOUND",
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


async def test_an_exec_takes_one_call_from_its_start_to_its_deletion(newer):
    identity = await newer.run("one", **QUIET)
    newer.node.calls.clear()
    call = run_exec(newer)
    exec_id = (await call.read()).exec_id
    await newer.node.called("Streams.Run")
    newer.node.world.end(identity, 3, exec_id, tell=False)
    assert (await call.read()).exit.code == 3  # the journal has not told it yet
    await newer.until(lambda: exec_id not in newer.node.world.tasks[identity])
    assert newer.node.calls == ["Streams.Run", "Streams.Forget"]


async def test_an_exec_that_is_run_starts_when_its_id_was_sent(newer):
    await newer.run("one", **QUIET)
    newer.node.calls.clear()
    unheard = newer.app._exec_runs.run("one", ExecConfig(("true",)))
    exec_id = await anext(unheard)
    await asyncio.sleep(0.05)
    await unheard.aclose()
    assert newer.app._below.execs.require(exec_id).state is ExecState.CREATED
    assert newer.node.calls == []


async def test_who_attached_to_an_exec_brings_the_stream_that_starts_it(newer):
    identity = await newer.run("one", **QUIET)
    exec_id = await make_exec(newer, open_stdin=True)
    client = AttachedClient(newer.execs.Attach, exec_id=exec_id, input=True)
    await client.begin()
    newer.node.calls.clear()
    await start_exec(newer, exec_id)
    await client.send(b"in", 0)
    process = newer.node.world.process(identity, exec_id)
    await newer.until(lambda: process.input == b"in")
    newer.node.world.write(identity, b"out", exec_id=exec_id)
    newer.node.world.end(identity, 0, exec_id)
    await client.rest()
    assert client.output == b"out"
    assert newer.node.calls == ["Streams.Run"]


async def test_an_exec_is_started_without_a_client_that_left_meanwhile(newer):
    identity = await newer.run("one", **QUIET)
    exec_id = await make_exec(newer)
    client = AttachedClient(newer.execs.Attach, exec_id=exec_id)
    await client.begin()
    starting = newer.node.block("Streams.Run")
    start = asyncio.create_task(start_exec(newer, exec_id))
    await newer.node.called("Streams.Run")
    client.call.cancel()
    await newer.until(lambda: not newer.app._sessions.count(exec_id))
    starting.set()
    assert await start == newer.node.world.process(identity, exec_id).pid
    later = AttachedClient(newer.execs.Attach, exec_id=exec_id)
    await later.begin()
    newer.node.world.write(identity, b"out", exec_id=exec_id)
    assert await later.until(3) == b"out"


async def test_a_start_that_an_older_shim_could_not_make_is_made_again(newer):
    identity = await newer.run("one", **QUIET)
    newer.node.older = True
    exec_id = await make_exec(newer)
    newer.node.fail("Tasks.Start", grpc.StatusCode.UNAVAILABLE, "not now", times=5)
    with pytest.raises(grpc.aio.AioRpcError):
        await start_exec(newer, exec_id)
    assert await start_exec(newer, exec_id) == newer.node.world.process(identity, exec_id).pid


async def test_a_start_whose_answer_is_lost_is_not_made_twice(newer):
    identity = await newer.run("one", **QUIET)
    newer.node.lose("Streams.Run", grpc.StatusCode.UNAVAILABLE)
    call = run_exec(newer)
    exec_id = (await call.read()).exec_id
    await newer.node.called("Streams.Run", 2)
    process = newer.node.world.process(identity, exec_id)
    newer.node.world.write(identity, b"out", exec_id=exec_id)
    assert (await call.read()).output.data == b"out"
    assert newer.node.world.process(identity, exec_id) is process


async def test_an_exec_that_is_run_goes_on_when_containerd_returns(newer):
    identity = await newer.run("one", **QUIET)
    call = run_exec(newer)
    exec_id = (await call.read()).exec_id
    await newer.node.called("Streams.Run")
    newer.node.world.write(identity, b"first ", exec_id=exec_id)
    assert (await call.read()).output.data == b"first "
    await newer.node.stop()
    newer.node.world.write(identity, b"second", exec_id=exec_id)
    newer.node.world.end(identity, 4, exec_id)
    await newer.node.start()
    answer = (await call.read()).output
    assert (answer.offset, answer.data) == (6, b"second")
    assert (await call.read()).exit.code == 4
    assert await call.read() is grpc.aio.EOF
    await newer.until(lambda: exec_id not in newer.node.world.tasks[identity])
    assert newer.node.calls.count("Streams.Run") == 1


async def test_an_exec_is_not_deleted_while_somebody_else_reads_it(newer):
    identity = await newer.run("one", **QUIET)
    call = run_exec(newer)
    exec_id = (await call.read()).exec_id
    await newer.node.called("Streams.Run")
    other = AttachedClient(newer.execs.Attach, exec_id=exec_id)
    await other.begin()
    newer.node.world.write(identity, b"out", exec_id=exec_id)
    newer.node.world.end(identity, 0, exec_id)
    while not (answer := await call.read()).HasField("exit"):
        continue
    assert answer.exit.code == 0
    await other.rest()
    assert other.output == b"out"
    await newer.until(lambda: exec_id not in newer.node.world.tasks[identity])
    assert "Streams.Forget" not in newer.node.calls


async def test_an_exec_that_is_read_is_deleted_after_a_stop_of_the_daemon(newer):
    identity = await newer.run("one", **QUIET)
    call = run_exec(newer)
    exec_id = (await call.read()).exec_id
    await newer.node.called("Streams.Run")
    await newer.restart()
    client = AttachedClient(newer.execs.Attach, exec_id=exec_id)
    await client.begin()
    newer.node.world.end(identity, 0, exec_id)
    await client.rest()
    assert (await wait_exec(newer, exec_id)).code == 0
    await newer.until(lambda: exec_id not in newer.node.world.tasks[identity])
