"""Execs that begin, run and end in one stream of a shim."""

from __future__ import annotations

import asyncio
import signal

import pytest

from protos.containerd.task.v3 import shim_pb2
from services.common import errors
from tests.fakes.shim_harness import KeeperProcess, plain_spec

STREAM = "theseus-stream:"


@pytest.fixture
async def shim(maker, fake, registry):
    shim = await maker.start(maker.bundle(plain_spec("/bin/sh", "-c", "exec sleep 1000")))
    await shim.create(binary=fake.path)
    await shim.start()
    return shim


async def missing(shim, exec_id):
    """Whether there is no such process."""
    try:
        await shim.state(exec_id)
    except errors.NotFound as error:
        assert error.resource == ("exec", exec_id)
        return True
    return False


async def test_an_exec_takes_one_stream(shim, registry):
    script = "echo out; echo err >&2; exit 7"
    async with shim.run("e", ["/bin/sh", "-c", script], stderr=STREAM) as attached:
        assert attached.started.pid > 0
        output, finished = await attached.rest()
        assert sorted(output.split()) == [b"err", b"out"]
        assert finished.offset == len(output)
        assert finished.exit.status == 7
        assert finished.exit.exited_at == (await shim.wait("e")).exited_at
        assert (await shim.state("e")).pid == attached.started.pid
        await attached.forget()
        assert [response async for response in attached] == []
    assert await missing(shim, "e")
    await registry.wait_for_topic("/tasks/exit")
    topics = ["/tasks/create", "/tasks/start"]
    topics += [f"/tasks/{name}" for name in ("exec-added", "exec-started", "exit")]
    assert registry.topics() == topics
    assert registry.of("/tasks/exec-started")[0].message.pid == attached.started.pid


async def test_how_it_ended_is_told_after_its_output_closed(shim, tmp_path):
    gate = tmp_path / "gate"
    script = f"exec >&- 2>&-; while [ ! -e {gate} ]; do sleep 0.01; done; exit 3"
    async with shim.run("e", ["/bin/sh", "-c", script]) as attached:
        telling = asyncio.create_task(anext(attached))
        await shim.state("e")
        assert not telling.done()
        gate.touch()
        assert (await telling).finished.exit.status == 3


async def test_input_reaches_it_and_ends(shim):
    async with shim.run("e", ["/bin/cat"], stdin=STREAM) as attached:
        await attached.write(0, b"through")
        await attached.close_input()
        output, finished = await attached.rest()
    assert (output, finished.exit.status) == (b"through", 0)


async def test_a_terminal_of_it_is_resized(shim):
    script = "read line; stty size"
    run = shim.run("e", ["/bin/sh", "-c", script], stdin=STREAM, terminal=True)
    async with run as attached:
        assert attached.started.terminal
        await attached.resize(100, 50)
        await attached.write(0, b"now\n")
        output, _ = await attached.rest()
    assert b"50 100\r\n" in output


async def test_one_that_cannot_be_started_leaves_nothing(shim, registry):
    with pytest.raises(errors.InvalidArgument) as refused:
        async with shim.run("e", ["/no/such"]):
            pass
    assert refused.value.reason == "COMMAND_NOT_FOUND"
    assert await missing(shim, "e")
    async with shim.run("e", ["/bin/true"]) as attached:  # its name is free
        assert (await attached.rest())[1].exit.status == 0
    await registry.wait_for_topic("/tasks/exit")
    assert len(registry.of("/tasks/exec-added")) == 1


async def test_a_call_that_is_made_again_makes_no_second_process(shim, fake):
    fake.hold("exec")
    first = asyncio.create_task(shim.run("e", ["/bin/cat"], stdin=STREAM).__aenter__())
    while not any(call[0] == "exec" for call in fake.calls()):
        await shim.state()
    second = asyncio.create_task(shim.run("e", ["/bin/cat"], stdin=STREAM).__aenter__())
    await shim.state()
    fake.release("exec")
    pids = {(await attaching).started.pid for attaching in (first, second)}
    third = await shim.run("e", ["/bin/cat"], stdin=STREAM).__aenter__()
    assert pids == {third.started.pid}
    await third.write(0, b"once")
    await third.close_input()
    assert (await third.rest())[0] == b"once"
    for call in (await first, await second, third):
        await call.__aexit__()
    assert sum(call[0] == "exec" for call in fake.calls()) == 1


async def test_a_start_goes_on_when_its_caller_goes_away(shim, fake):
    fake.hold("exec")
    attaching = asyncio.create_task(shim.run("e", ["/bin/echo", "out"]).__aenter__())
    while not any(call[0] == "exec" for call in fake.calls()):
        await shim.state()
    attaching.cancel()
    await asyncio.gather(attaching, return_exceptions=True)
    fake.release("exec")
    async with shim.run("e", ["/bin/echo", "out"]) as attached:
        assert (await attached.rest())[0] == b"out\n"
    assert sum(call[0] == "exec" for call in fake.calls()) == 1


async def test_only_an_exec_that_has_ended_is_forgotten(shim):
    async with shim.run("e", ["/bin/sleep", "1000"]) as attached:
        await attached.forget()
        with pytest.raises(errors.FailedPrecondition, match="cannot delete process 'e'"):
            await anext(attached)
    await shim.kill(exec_id="e")
    assert (await shim.wait("e")).exit_status == 128 + signal.SIGKILL


async def test_init_is_not_forgotten_by_its_streams(maker, fake):
    shim = await maker.start(maker.bundle(plain_spec("/bin/sleep", "1000")))
    await shim.create(binary=fake.path, stdout=STREAM)
    async with shim.attach(output=True) as attached:
        await attached.forget()
        with pytest.raises(errors.FailedPrecondition, match="only an exec process"):
            await anext(attached)


async def test_a_bad_process_is_refused(shim):
    for exec_id, spec, kind in (
        ("e", b"no json", errors.InvalidArgument),
        ("a/b", b"{}", errors.InvalidArgument),
    ):
        attaching = shim.attach(exec_id=exec_id, output=True, process={"spec": spec})
        with pytest.raises(kind):
            async with attaching:
                pass
    await shim.call("Pause", shim_pb2.PauseRequest(id=shim.id))
    with pytest.raises(errors.FailedPrecondition, match="cannot exec in"):
        async with shim.run("e", ["/bin/true"]):
            pass
    assert await missing(shim, "e")


async def test_it_goes_on_over_a_reexecution(shim, tmp_path):
    gate = tmp_path / "gate"
    script = f"echo first; while [ ! -e {gate} ]; do sleep 0.01; done; echo last; exit 5"
    async with shim.run("e", ["/bin/sh", "-c", script]) as attached:
        seen = await attached.read_until(b"first\n")
        await shim.reexec()
        with pytest.raises(errors.Unavailable):
            await anext(attached)
    gate.touch()
    # Whoever has not heard that it was started asks as before, and starts no other.
    async with shim.run("e", ["/no/such"]) as attached:
        output, finished = await attached.rest()
        assert (output, finished.exit.status) == (seen + b"last\n", 5)
        await attached.forget()
        assert [response async for response in attached] == []


async def test_a_start_is_waited_for_before_a_reexecution(shim, fake):
    fake.hold("exec")
    attaching = asyncio.create_task(shim.run("e", ["/bin/sleep", "1000"]).__aenter__())
    while not any(call[0] == "exec" for call in fake.calls()):
        await shim.state()
    reexecuting = asyncio.create_task(shim.reexec())
    await asyncio.sleep(0)
    fake.release("exec")
    await reexecuting
    assert (await shim.state("e")).pid > 0
    await asyncio.gather(attaching, return_exceptions=True)
    assert sum(call[0] == "exec" for call in fake.calls()) == 1


async def test_a_successor_of_a_killed_shim_tells_how_it_ended(maker, fake, tmp_path):
    keeper = KeeperProcess(tmp_path)
    bundle = maker.bundle(plain_spec("/bin/sleep", "1000"))
    shim = await maker.start(bundle, keeper=str(keeper.socket))
    await shim.create(binary=fake.path)
    await shim.start()
    async with shim.run("e", ["/bin/sh", "-c", "echo a; read x; exit 6"], stdin=STREAM) as attached:
        await attached.read_until(b"a\n")
        await shim.die()
    shim = await maker.adopt(shim)
    resumed = shim.attach(exec_id="e", output=True, input=True, offset=2, exit=True)
    async with resumed as attached:
        await attached.write(0, b"on\n")
        assert (await attached.rest())[1].exit.status == 6
        await attached.forget()
        assert [response async for response in attached] == []
    assert await missing(shim, "e")
    keeper.kill()
