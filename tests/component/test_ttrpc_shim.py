"""The program ``containerd-shim-theseus-v1`` between a played containerd and a fake runtime."""

import asyncio
import json
import os
import shutil
import signal
import tempfile
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import pytest

from protos.containerd.runtime.bootstrap.v1 import bootstrap_pb2
from protos.containerd.task.v2 import shim_pb2 as v2
from services.common.errors import Unavailable
from services.common.ttrpc import status
from services.common.ttrpc.client import CallFailed
from services.shim.ttrpc import ending
from tests.fakes import runtime as fake_runtime
from tests.fakes.eventually import eventually
from tests.fakes.shim_harness import plain_spec
from tests.fakes.stock_shim import StockContainerd, StockShim, kill, parent_of, wait


@pytest.fixture
def directory():
    path = Path(tempfile.mkdtemp(prefix="thst", dir="/tmp"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
async def containerd(directory):
    playing = StockContainerd(directory)
    yield playing
    await playing.close()


@pytest.fixture
def runtime(directory):
    return fake_runtime.install(directory / "bin")


@pytest.fixture
async def start(containerd):
    async with AsyncExitStack() as stack:

        async def make(spec, name="c1"):
            shim = await containerd.start(containerd.bundle(spec, name))
            return await stack.enter_async_context(shim)

        yield make


async def ended(pidfd):
    await asyncio.to_thread(wait, pidfd)
    os.close(pidfd)


async def test_a_task_from_start_to_delete_and_the_shim_ends(containerd, runtime, start):
    await containerd.events.start()
    shim = await start(plain_spec("/bin/sh", "-c", "exit 7"))
    created = await shim.create(runtime.path)
    assert (await shim.call("State")).pid == created.pid
    shim_pidfd = os.pidfd_open(await shim.pid())
    assert (await shim.call("Start")).pid == created.pid
    assert (await shim.call("Wait", version="v3")).exit_status == 7
    # An exited task stays in Pids: containerd 2.x takes an empty answer for a leak.
    assert [p.pid for p in (await shim.call("Pids")).processes] == [created.pid]
    deleted = await shim.call("Delete")
    assert (deleted.pid, deleted.exit_status) == (created.pid, 7)
    await shim.call("Shutdown")
    await ended(shim_pidfd)
    assert not Path(shim.address.removeprefix("unix://")).exists()
    topics = await containerd.events.topics(4)
    assert topics == ["/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"]
    # What containerd 1.6 asks after each deletion: the same, though there is no shim any more.
    again = v2.DeleteResponse.FromString(containerd.run("delete", shim.bundle))
    assert (again.pid, again.exit_status) == (created.pid, 7)
    assert again.exited_at == deleted.exited_at


async def test_events_wait_for_a_containerd_that_is_down(containerd, runtime, start):
    shim = await start(plain_spec("/bin/sh", "-c", "exit 9"))
    await shim.create(runtime.path)
    await shim.call("Start")
    await shim.call("Wait")
    await shim.call("Delete")
    shim_pidfd = os.pidfd_open(await shim.pid())
    await shim.call("Shutdown")
    # As containerd does, which does not know what it has not been told.
    shutil.rmtree(shim.bundle)
    containerd.events.refusals = [Unavailable("not now")]
    await containerd.events.start()
    assert await containerd.events.topics(2) == ["/tasks/create", "/tasks/start"]
    topic, told = await containerd.events.next()
    assert (topic, told.exit_status, told.id) == ("/tasks/exit", 9, "c1")
    assert await containerd.events.topics(1) == ["/tasks/delete"]
    await ended(shim_pidfd)


async def test_events_go_on_over_a_restart_of_containerd(containerd, runtime, start):
    await containerd.events.start()
    shim = await start(plain_spec("/bin/sleep", "1000"))
    await shim.create(runtime.path)
    assert await containerd.events.topics(1) == ["/tasks/create"]
    await containerd.events.stop()
    await shim.call("Start")
    await shim.call("Kill", signal=signal.SIGTERM)
    assert (await shim.call("Wait")).exit_status == 128 + signal.SIGTERM
    await containerd.events.start()
    assert await containerd.events.topics(1) == ["/tasks/start"]
    topic, told = await containerd.events.next()
    assert (topic, told.exit_status) == ("/tasks/exit", 128 + signal.SIGTERM)


async def test_one_shim_for_a_pod_ends_with_its_last_container(containerd, runtime, start):
    await containerd.events.start()
    spec = plain_spec("/bin/sleep", "1000")
    spec["annotations"] = {"io.kubernetes.cri.sandbox-id": "pod"}
    first, second = await start(spec, "sandbox"), await start(spec, "app")
    other = await start(plain_spec("/bin/sleep", "1000"), "other")
    assert first.address == second.address != other.address
    for shim in (first, second):
        await shim.create(runtime.path)
        await shim.call("Start")
    assert await first.pid() == await second.pid() != await other.pid()
    shim_pidfd = os.pidfd_open(await first.pid())
    for shim in (second, first):
        await shim.call("Kill", signal=signal.SIGKILL)
        assert (await shim.call("Wait")).exit_status == 137
        await shim.call("Delete")
        await shim.call("Shutdown")
    await ended(shim_pidfd)


async def test_shims_come_from_one_warm_process(containerd, start):
    one, two = await start(plain_spec("true"), "one"), await start(plain_spec("true"), "two")
    warm = parent_of(await two.pid())
    assert parent_of(await one.pid()) == warm != os.getpid()
    assert Path(f"/proc/{warm}/comm").read_text() == "theseus-warm\n"
    assert Path(f"/proc/{await one.pid()}/comm").read_text() == "theseus-shim\n"
    # Nothing of the first request is held open by it.
    held = [str(fd.readlink()) for fd in Path(f"/proc/{warm}/fd").iterdir()]
    assert not [name for name in held if str(one.bundle) in name]
    await asyncio.to_thread(kill, warm)
    three = await start(plain_spec("true"), "three")
    assert parent_of(await three.pid()) != warm
    assert await one.pid() > 0


async def test_the_shim_is_independent_of_who_started_it(containerd, start):
    shim = await start(plain_spec("true"))
    pid = await shim.pid()
    assert os.getsid(pid) != os.getsid(0)
    assert {Path(f"/proc/{pid}/fd/{fd}").readlink() for fd in range(3)} == {Path("/dev/null")}
    assert Path(f"/proc/{pid}/cwd").readlink() == Path("/")
    maps = Path(f"/proc/{pid}/maps").read_text()
    assert "google/_upb" in maps
    assert "cygrpc" not in maps
    own = int(Path("/proc/self/oom_score_adj").read_text())
    assert int(Path(f"/proc/{pid}/oom_score_adj").read_text()) == min(own + 1, 1000)


async def test_newer_containerds_are_answered_in_their_ways(containerd):
    bundle = containerd.bundle(plain_spec("true"), "c1")
    plain = containerd.run("start", bundle).decode()
    answer = json.loads(containerd.run("start", bundle, MAX_SHIM_VERSION="2"))
    assert answer == {"version": 2, "address": plain, "protocol": "ttrpc"}
    params = bootstrap_pb2.BootstrapParams(instance_id="c1", namespace="ns")
    given = params.SerializeToString()
    result = bootstrap_pb2.BootstrapResult.FromString(
        containerd.run("start", bundle, given=given, MAX_SHIM_VERSION="2")
    )
    assert (result.version, result.address, result.protocol) == (3, plain, "ttrpc")


@pytest.mark.root
async def test_a_long_directory_gets_its_socket_elsewhere(directory):
    playing = StockContainerd(directory / ("d" * 100))
    playing.directory.mkdir()
    address = playing.run("start", playing.bundle(plain_spec("true"), "c1")).decode()
    path = Path(address.removeprefix("unix://"))
    try:
        assert path.parent == Path("/run/theseus/s")
        assert path.is_socket()
    finally:
        await playing.close()
        for left in [path, *path.parent.glob("warm-*")]:
            left.unlink()
        with suppress(OSError):  # others may use it
            path.parent.rmdir()
            path.parent.parent.rmdir()


async def test_errors_have_the_codes_of_grpc(containerd, runtime, start):
    shim = await start(plain_spec("/bin/sleep", "1000"))
    with pytest.raises(CallFailed, match="not created") as caught:
        await shim.call("State")
    assert caught.value.code == 5
    await shim.create(runtime.path)
    with pytest.raises(CallFailed) as caught:
        await shim.create(runtime.path)
    assert caught.value.code == 6
    await shim.call("Start")
    with pytest.raises(CallFailed, match="a checkpoint needs a directory") as caught:
        await shim.call("Checkpoint")
    assert caught.value.code == status.INVALID_ARGUMENT
    with pytest.raises(CallFailed, match="running") as caught:
        await shim.call("Delete")
    assert caught.value.code == 9
    with pytest.raises(CallFailed, match="there is no signal") as caught:
        await shim.call("Kill", signal=1000)
    assert caught.value.code == status.INVALID_ARGUMENT
    await shim.call("Kill", signal=signal.SIGKILL)
    await shim.call("Wait")


async def test_a_wait_that_broke_off_is_asked_again(containerd, runtime, start):
    shim = await start(plain_spec("/bin/sleep", "1000"))
    await shim.create(runtime.path)
    await shim.call("Start")
    async with await StockShim.connect(shim.address, shim.bundle) as first:
        waiting = asyncio.create_task(first.call("Wait"))
        await asyncio.sleep(0)
    with pytest.raises(ConnectionError):
        await waiting
    await shim.call("Kill", signal=signal.SIGINT)
    assert (await shim.call("Wait")).exit_status == 128 + signal.SIGINT


async def killed_shim(shim):
    await asyncio.to_thread(kill, await shim.pid())


async def test_delete_after_a_dead_shim_ends_the_container(containerd, runtime, start):
    shim = await start(plain_spec("/bin/sleep", "1000"))
    pid = (await shim.create(runtime.path)).pid
    await shim.call("Start")
    await killed_shim(shim)
    pidfd = os.pidfd_open(pid)
    response = v2.DeleteResponse.FromString(containerd.run("delete", shim.bundle))
    await ended(pidfd)
    assert not Path(shim.address.removeprefix("unix://")).exists()
    # Killed by the deletion itself, so this is no invention.
    assert (response.pid, response.exit_status) == (pid, 128 + signal.SIGKILL)
    assert [call[0] for call in runtime.calls()][-1] == "delete"


async def test_delete_after_a_dead_shim_knows_an_exit_that_it_saw(containerd, runtime, start):
    shim = await start(plain_spec("/bin/sh", "-c", "exit 3"))
    pid = (await shim.create(runtime.path)).pid
    await shim.call("Start")
    exited_at = (await shim.call("Wait")).exited_at
    await killed_shim(shim)
    # Of the two places that tell it, the spool is the first to be written.
    (shim.bundle / "state.json").unlink()
    response = v2.DeleteResponse.FromString(containerd.run("delete", shim.bundle))
    assert (response.pid, response.exit_status, response.exited_at) == (pid, 3, exited_at)


async def test_delete_tells_an_unknown_status_as_unknown(containerd, runtime, start):
    shim = await start(plain_spec("/bin/sleep", "1000"))
    pid = (await shim.create(runtime.path)).pid
    await shim.call("Start")
    await killed_shim(shim)
    await asyncio.to_thread(kill, pid)
    response = v2.DeleteResponse.FromString(containerd.run("delete", shim.bundle))
    assert (response.pid, response.exit_status) == (0, ending.UNKNOWN_STATUS)


async def test_delete_of_what_never_was(containerd):
    bundle = containerd.bundle(plain_spec("true"), "c1")
    response = v2.DeleteResponse.FromString(containerd.run("delete", bundle))
    assert (response.pid, response.exit_status) == (0, ending.UNKNOWN_STATUS)


async def test_a_dead_shims_socket_is_taken_over(containerd, start):
    first = await start(plain_spec("true"))
    pid = await first.pid()
    await killed_shim(first)
    address = containerd.run("start", first.bundle).decode()
    assert address == first.address
    async with await StockShim.connect(address, first.bundle) as second:
        assert await second.pid() != pid


async def test_a_signal_ends_an_empty_shim_and_no_other(containerd, runtime, start):
    shim = await start(plain_spec("/bin/sleep", "1000"))
    await shim.create(runtime.path)
    pid = await shim.pid()
    shim_pidfd = os.pidfd_open(pid)
    os.kill(pid, signal.SIGTERM)
    await shim.call("Start")
    await shim.call("Kill", signal=signal.SIGKILL)
    await shim.call("Wait")
    await shim.call("Delete")
    os.kill(pid, signal.SIGTERM)
    await ended(shim_pidfd)


async def test_output_goes_to_fifos_and_input_comes_from_one(containerd, runtime, start, directory):
    for name in ("in", "out"):
        os.mkfifo(directory / name)
    shim = await start(plain_spec("/bin/cat"))
    out = os.open(directory / "out", os.O_RDONLY | os.O_NONBLOCK)
    await shim.create(runtime.path, stdin=str(directory / "in"), stdout=str(directory / "out"))
    await shim.call("Start")
    source = os.open(directory / "in", os.O_WRONLY)
    os.write(source, b"hello\n")
    os.close(source)
    await shim.call("CloseIO", stdin=True)
    assert (await shim.call("Wait")).exit_status == 0
    assert await eventually(lambda: os.read(out, 100)) == b"hello\n"
    os.close(out)
