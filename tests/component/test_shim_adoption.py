"""A shim is SIGKILLed under a running container, and a successor takes over."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path

import pytest

from protos.containerd.task.v3 import shim_pb2
from protos.containerd.types.task import task_pb2
from services.common import errors
from tests.fakes.eventually import eventually
from tests.fakes.shim_harness import KeeperProcess, plain_spec

STREAM = "theseus-stream:"
TICKING = 'n=0; while [ ! -e "$STOP" ]; do n=$((n+1)); echo $n; sleep 0.01; done; exit 7'


@pytest.fixture
def keeper(tmp_path):
    keeper = KeeperProcess(tmp_path)
    yield keeper
    keeper.kill()


@pytest.fixture
def shell(maker, fake, keeper):
    async def start(script, *, environment=(), **create):
        terminal = create.get("terminal", False)
        spec = plain_spec("/bin/sh", "-c", script, terminal=terminal, env=list(environment))
        shim = await maker.start(maker.bundle(spec), keeper=str(keeper.socket))
        await shim.create(binary=fake.path, **create)
        await shim.start()
        return shim

    return start


def lines_of(log):
    return [json.loads(line)["log"] for line in log.read_text().splitlines()]


async def test_container_goes_on_and_its_status_is_true(shell, maker, registry, tmp_path):
    log, stop = tmp_path / "c.log", tmp_path / "stop"
    uri = f"theseus-log://{log}"
    shim = await shell(TICKING, environment=[f"STOP={stop}"], stdout=uri, stderr=uri)
    init = (await shim.state()).pid
    for _ in range(3):
        wanted = len(lines_of(log)) + 10
        await eventually(lambda wanted=wanted: len(lines_of(log)) > wanted)
        await shim.die()
        shim = await maker.adopt(shim)
        state = await shim.state()
        assert (state.status, state.pid) == (task_pb2.RUNNING, init)
    stop.touch()
    assert (await shim.wait()).exit_status == 7
    assert (await shim.delete()).exit_status == 7
    seen = [int(line) for line in lines_of(log)]
    assert seen == sorted(set(seen))
    missing = set(range(1, seen[-1])) - set(seen)
    entries = [json.loads(line) for line in (shim.bundle / "shim.log").read_text().splitlines()]
    reported = sum(entry.get("at_most_bytes", 0) for entry in entries)
    assert sum(len(f"{number}\n") for number in missing) <= reported
    await registry.wait_for_topic("/tasks/delete")
    assert registry.topics() == ["/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"]


async def test_end_while_there_is_no_shim_is_known(shell, maker, registry, tmp_path):
    stop = tmp_path / "stop"
    shim = await shell(TICKING, environment=[f"STOP={stop}"])
    pidfd = os.pidfd_open((await shim.state()).pid)
    await shim.die()
    stop.touch()
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(pidfd, ended.set)
    await ended.wait()
    loop.remove_reader(pidfd)
    os.close(pidfd)
    shim = await maker.adopt(shim)
    assert (await shim.wait()).exit_status == 7
    assert (await shim.delete()).exit_status == 7


async def test_terminal_input_and_exec_go_on(shell, maker):
    shim = await shell("stty -echo; cat", terminal=True, stdin=STREAM, stdout=STREAM)
    await shim.exec("e", ["/bin/sh", "-c", "read line; exit 5"], stdin=STREAM, stdout=STREAM)
    async with shim.attach(input=True, output=True) as attached:
        await attached.write(0, b"one\n")
        await attached.read_until(b"one")
        offset = attached.started.offset
    await shim.die()
    shim = await maker.adopt(shim)
    async with shim.attach(input=True, output=True, from_end=True) as attached:
        assert attached.started.input_offset == 4
        assert attached.started.offset >= offset + len(b"one")
        await attached.write(4, b"two\n")
        await attached.read_until(b"two")
    async with shim.attach(exec_id="e", input=True) as attached:
        await attached.write(0, b"word\n")
        assert (await shim.wait("e")).exit_status == 5
    await shim.kill()
    assert (await shim.wait()).exit_status == 128 + signal.SIGKILL


async def test_client_behind_is_told_what_is_missing(shell, maker, tmp_path):
    uri = f"theseus-log://{tmp_path}/c.log"
    shim = await shell("echo hello; exec sleep 1000", stdout=uri)
    async with shim.attach(output=True) as attached:
        await attached.read_until(b"hello\n")
    await shim.die()
    shim = await maker.adopt(shim)
    async with shim.attach(output=True, offset=2) as attached:
        gap = (await anext(attached)).gap
        assert (getattr(gap, "from"), gap.to) == (2, 6)


async def test_input_that_was_closed_stays_closed(shell, maker):
    shim = await shell("cat; exit 4", stdin=STREAM)
    async with shim.attach(input=True) as attached:
        await attached.write(0, b"x")
        await attached.close_input()
        assert (await shim.wait()).exit_status == 4  # the keeper does not hold it open


async def test_fifo_of_a_client_ends_with_the_process(shell, tmp_path):
    fifo = tmp_path / "out"
    os.mkfifo(fifo)
    reading = asyncio.create_task(asyncio.to_thread(fifo.read_bytes))
    shim = await shell("echo hello", stdout=str(fifo))
    await shim.wait()
    assert await reading == b"hello\n"


async def test_adopted_shim_can_be_reexecuted(shell, maker, tmp_path):
    log, stop = tmp_path / "c.log", tmp_path / "stop"
    shim = await shell(TICKING, environment=[f"STOP={stop}"], stdout=f"theseus-log://{log}")
    await shim.reexec()
    await shim.die()
    shim = await maker.adopt(shim)
    await shim.reexec()
    stop.touch()
    request = shim_pb2.WaitRequest(id=shim.id)
    assert (await shim.patient(shim.task.Wait, request)).exit_status == 7


async def test_without_a_keeper_the_container_goes_on_without_streams(shell, maker, keeper):
    shim = await shell("exec sleep 1000", stdout=STREAM, stdin=STREAM)
    keeper.kill()
    await shim.die()
    shim = await maker.adopt(shim)
    keeper.start()
    with pytest.raises(errors.FailedPrecondition, match="no streams to attach to"):
        async with shim.attach(output=True):
            pass
    await shim.kill()
    assert (await shim.wait()).exit_status == 128 + signal.SIGKILL


async def test_status_that_nobody_can_know_is_reported_lost(shell, maker, keeper, registry):
    shim = await shell("exec sleep 1000")
    pid = (await shim.state()).pid
    keeper.kill()
    await shim.die()
    os.kill(pid, signal.SIGKILL)
    await eventually(lambda: not Path(f"/proc/{pid}").exists())
    keeper.start()
    shim = await maker.adopt(shim)
    with pytest.raises(errors.DataLoss, match="its exit status is lost"):
        await shim.wait()
    assert (await shim.state()).status == task_pb2.UNKNOWN
    with pytest.raises(errors.DataLoss):
        await shim.delete()
    await registry.wait_for_topic("/tasks/lost")


async def test_shims_store_again_with_a_new_keeper(shell, maker, keeper):
    shim = await shell("exec sleep 1000", stdout=STREAM)
    await eventually(lambda: keeper.held() >= 3)  # pipe, pidfd, meter
    full = keeper.held()
    keeper.kill()
    keeper.start()
    await eventually(lambda: keeper.held() == full)
    await shim.die()
    shim = await maker.adopt(shim)
    async with shim.attach(output=True, from_end=True):
        pass


async def test_keeper_holds_nothing_of_a_deleted_container(shell, keeper):
    shim = await shell("cat", terminal=True, stdin=STREAM, stdout=STREAM)
    await shim.exec("e", ["/bin/true"], stdin=STREAM, stdout=STREAM)
    await shim.wait("e")
    await shim.delete("e")
    await eventually(lambda: keeper.held() >= 3)  # terminal, pidfd, meter
    await shim.kill()
    await shim.wait()
    await shim.delete()
    await eventually(lambda: keeper.held() == 0)


async def test_nothing_to_adopt_is_an_error(maker, keeper, factory):
    shim = await maker.start(maker.bundle(plain_spec("/bin/true")), keeper=str(keeper.socket))
    await shim.die()
    answer = factory.ask({**shim.request, "adopt": True})
    assert "has left no container to take over" in answer["error"]


async def test_a_deleted_container_is_not_adopted(shell, maker, keeper, fake, factory):
    fake.hold("delete")
    shim = await shell("exit 3")
    await shim.wait()
    await shim.delete()
    await shim.die()
    fake.release("delete")  # it is orphaned, and goes on
    answer = factory.ask({**shim.request, "adopt": True})
    assert "has left no container to take over" in answer["error"]
    await eventually(lambda: keeper.held() == 0)
