"""Shims that wait ready: they become shims like any other, or end, and leave nothing."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf import any_pb2

from protos.containerd.task.v3 import shim_pb2
from protos.containerd.types.runc.options import oci_pb2
from services.common import errors
from services.common.ttrpc.client import TtrpcClient
from tests.fakes.eventually import eventually
from tests.fakes.registry_server import FakeRegistry
from tests.fakes.shim_harness import REPOSITORY, RunningShim, ShimMaker, plain_spec


class Waiting:
    """A process that waits to be told which shim it is."""

    def __init__(self, factory, places):
        self.connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.connection.settimeout(20)
        self.connection.connect(str(factory.socket))
        self.pid = self.ask({"wait_in": str(places)})["waiting"]
        self.socket = places / f"waiting-{self.pid}"

    def ask(self, request):
        self.connection.send(json.dumps(request).encode())
        answer = self.connection.recv(65536)
        return json.loads(answer) if answer else {}

    async def ended(self):
        await eventually(lambda: not Path(f"/proc/{self.pid}").exists())


class Maker(ShimMaker):
    """Makes shims out of processes that waited."""

    def waiting(self):
        places = self.directory / "state" / "w"
        places.mkdir(exist_ok=True)
        return Waiting(self._factory, places)

    async def start(self, bundle, **more):
        waiting = self.waiting()
        request = self.request(bundle, **more)
        answer = waiting.ask(request)
        waiting.connection.close()
        assert answer["pid"] == waiting.pid
        assert not waiting.socket.exists()
        shim = RunningShim(answer, request)
        self._stack.push_async_callback(shim.close)
        return shim


@pytest.fixture
async def maker(factory, tmp_path):
    async with Maker(factory, tmp_path) as maker:
        yield maker


async def test_one_that_waited_is_a_shim_like_any_other(maker, fake):
    registry = FakeRegistry(maker.registry_socket)
    await registry.start()
    shim = await maker.start(maker.bundle(plain_spec("/bin/sh", "-c", "read x; exit $x")))
    assert os.getsid(shim.pid) == shim.pid
    assert Path(f"/proc/{shim.pid}/comm").read_text().strip() == "theseus-shim"
    await shim.create(binary=fake.path, stdin="theseus-stream:")
    await shim.start()
    async with shim.attach(input=True) as attached:
        await attached.write(0, b"7\n")
        assert (await shim.wait()).exit_status == 7
    with pytest.raises(errors.NotFound):
        await shim.call("State", shim_pb2.StateRequest(id="nobody"))
    assert 'grpc_method="Create"' in await shim.metrics()
    await shim.delete()
    await registry.wait_for_topic("/tasks/delete")
    entries = [json.loads(line) for line in (shim.bundle / "shim.log").read_text().splitlines()]
    assert {(entry["tier"], entry["namespace"], entry["shim_id"]) for entry in entries} == {
        ("shim", "test", shim.id)
    }
    await shim.shutdown()
    await shim.ended()
    assert list((maker.directory / "state" / "s").iterdir()) == []
    await registry.stop()


async def test_one_that_waited_can_be_executed_anew(maker, fake):
    shim = await maker.start(maker.bundle(plain_spec("/bin/sleep", "1000")))
    await shim.create(binary=fake.path)
    pid = (await shim.start()).pid
    await shim.reexec()
    request = shim_pb2.StateRequest(id=shim.id)
    assert (await shim.patient(shim.task.State, request)).pid == pid


async def test_one_that_waited_can_be_replaced_by_one_that_waited(maker, fake):
    shim = await maker.start(maker.bundle(plain_spec("/bin/sleep", "1000")))
    await shim.create(binary=fake.path)
    pid = (await shim.start()).pid
    await shim.die()
    waiting = maker.waiting()
    answer = waiting.ask({**shim.request, "adopt": True})
    successor = RunningShim(answer, shim.request)
    assert (await successor.state()).pid == pid
    waiting.connection.close()
    await successor.close()


async def test_one_that_nobody_wants_ends_and_leaves_nothing(maker):
    waiting = maker.waiting()
    assert waiting.socket.exists()
    with socket.socket(socket.AF_UNIX) as early:  # a caller that cannot wait gets nothing from it
        early.connect(str(waiting.socket))
    waiting.connection.close()
    await waiting.ended()
    assert not waiting.socket.exists()


async def test_a_call_may_come_before_the_request(maker, fake):
    bundle = maker.bundle(plain_spec("/bin/sleep", "1000"))
    waiting, request = maker.waiting(), maker.request(bundle)
    async with await TtrpcClient.connect(waiting.socket) as early:
        options = oci_pb2.Options(binary_name=str(fake.path)).SerializeToString()
        create = shim_pb2.CreateTaskRequest(
            id=request["id"],
            bundle=str(bundle),
            options=any_pb2.Any(type_url="containerd.runc.v1.Options", value=options),
        )
        service, payload = "containerd.task.v3.Task", create.SerializeToString()
        call = asyncio.ensure_future(early.call(service, "Create", payload, timeout_s=10))
        await asyncio.sleep(0)  # the call is on its way
        answer = waiting.ask(request)
        pid = shim_pb2.CreateTaskResponse.FromString(await call).pid
        waiting.connection.close()
        shim = RunningShim(answer, request)
        shim._note_init(pid)
        assert (await shim.state()).pid == pid
        await eventually((bundle / "shim.json").exists)  # that is not waited for
        assert json.loads((bundle / "shim.json").read_text())["pid"] == shim.pid
        await shim.close()


class Again(Waiting):
    """A process that is the shim of one container after the other."""

    async def be(self, maker, bundle, **more):
        request = maker.request(bundle, **more)
        answer = self.ask(request)
        assert answer["pid"] == self.pid, answer
        return RunningShim(answer, request)

    def files(self):
        """What it has open, but for its log, and sockets, which are others each time."""
        fds = Path(f"/proc/{self.pid}/fd").iterdir()
        found = [str(fd.readlink()) for fd in fds if fd.name != "2"]
        return sorted(name for name in found if not name.startswith("socket:")), len(found)

    async def next(self):
        """What it says next; nothing if it ends."""
        answer = await asyncio.to_thread(self.connection.recv, 65536)
        return json.loads(answer) if answer else {}


@pytest.fixture
async def registry(maker):
    registry = FakeRegistry(maker.registry_socket)
    await registry.start()
    yield registry
    await registry.stop()


@pytest.fixture
async def again(maker, registry):
    places = maker.directory / "state" / "w"
    places.mkdir(exist_ok=True)
    again = Again(maker._factory, places)
    yield again
    again.connection.close()
    await again.ended()


async def live(shim, fake, **streams):
    """A container's life, from Create to Delete."""
    await shim.create(binary=fake.path, **streams)
    await shim.start()
    await shim.kill()
    assert (await shim.wait()).exit_status == 137
    await shim.delete()


async def test_it_is_the_shim_of_one_container_after_the_other(maker, fake, again):
    waited = again.files()
    for number in range(3):
        bundle = maker.bundle(plain_spec("/bin/sleep", "1000"))
        shim = await again.be(maker, bundle, namespace=f"n{number}")
        assert Path(f"/proc/{again.pid}/fd/2").readlink() == bundle / "shim.log"
        log = f"theseus-log://{bundle}/log?format=json-file"
        await live(shim, fake, stdout=log, stderr=log, stdin="theseus-stream:")
        page = await shim.peer.call("theseus.shim.v1.Control/Metrics", b"", timeout_s=10)
        counted = re.search(rb'started_total{[^}]*grpc_method="Create"[^}]*} (\d+)', page)
        assert counted[1] == b"1"
        assert len((bundle / "shim.json").read_bytes()) > 0
        await shim.shutdown()
        assert (await again.next())["waiting"] == again.pid
        assert again.files() == waited
        assert not Path(shim.request["socket"]).exists()
        assert Path(f"/proc/{again.pid}/comm").read_text().strip() == "theseus-waiting"
        entries = [json.loads(line) for line in (bundle / "shim.log").read_text().splitlines()]
        assert {(entry["namespace"], entry["shim_id"]) for entry in entries} == {
            (f"n{number}", bundle.name)
        }
        await shim.close_client()


async def test_one_that_was_told_at_once_waits_after_that_if_it_may(maker, fake, registry):
    places = maker.directory / "state" / "w"
    places.mkdir()
    bundle = maker.bundle(plain_spec("/bin/sleep", "1000"))
    request = maker.request(bundle, then_wait_in=str(places))
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(20)
        connection.connect(str(maker._factory.socket))
        connection.send(json.dumps(request).encode())
        shim = RunningShim(json.loads(connection.recv(65536)), request)
        await live(shim, fake)
        await shim.shutdown()
        answer = json.loads(await asyncio.to_thread(connection.recv, 65536))
        assert answer["waiting"] == shim.pid
        assert (places / f"waiting-{shim.pid}").exists()
    await shim.ended()
    assert not (places / f"waiting-{shim.pid}").exists()
    await shim.close()


async def shut_down_now(shim, fake):
    await live(shim, fake)
    await shim.shutdown(now=True)


async def had_no_container(shim, fake):
    await shim.shutdown()


async def failed_to_create(shim, fake):
    with pytest.raises(errors.TheseusError):
        await shim.create(binary="no-such-runtime")
    await shim.shutdown()


async def spoke_grpc(shim, fake):
    await shim.info()
    await live(shim, fake)
    await shim.shutdown()


@pytest.mark.parametrize("life", [shut_down_now, had_no_container, failed_to_create, spoke_grpc])
async def test_one_that_has_not_led_a_plain_life_ends(maker, fake, again, life):
    shim = await again.be(maker, maker.bundle(plain_spec("/bin/sleep", "1000")))
    await life(shim, fake)
    assert await again.next() == {}
    await shim.close()


ONE = """
import asyncio, os, socket, subprocess, sys, threading
from services.shim import birth
from services.shim.app import Shim
from services.shim.metrics import ShimMetrics

birth.LIVES_MAX = 2
run = Shim.run

async def leave(shim, *arguments):
    await run(shim, *arguments)
    {leave}

Shim.run = leave
birth.be_asked(socket.socket(fileno=int(sys.argv[1])), Shim(ShimMetrics()))
"""


class Single(Again):
    """One that no factory forked, and that leaves something with each container."""

    def __init__(self, places, leave):
        self.connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", ONE.format(leave=leave), str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                cwd=REPOSITORY,
            )
        self.connection.settimeout(20)
        self.pid = self.ask({"wait_in": str(places)})["waiting"]
        self.socket = places / f"waiting-{self.pid}"

    def __enter__(self):
        return self

    def __exit__(self, *details):
        self.connection.close()
        self.process.wait(10)


async def a_life(one, maker, fake):
    shim = await one.be(maker, maker.bundle(plain_spec("/bin/sleep", "1000")))
    await live(shim, fake)
    await shim.shutdown()
    said = await one.next()
    await shim.close_client()
    return said


@pytest.mark.parametrize(
    ("leave", "what"),
    [
        ("os.open('/etc/passwd', os.O_RDONLY)", "files"),
        ("threading.Thread(target=threading.Event().wait, daemon=True).start()", "threads"),
        ("globals()['task'] = asyncio.ensure_future(asyncio.Event().wait())", "tasks"),
        ("os.posix_spawn('/bin/true', ['true'], {})", "children"),
        ("os.chdir('/tmp')", "directory"),
    ],
)
async def test_one_with_something_left_says_so_and_ends(maker, fake, registry, leave, what):
    places = maker.directory / "state" / "w"
    places.mkdir()
    with Single(places, leave) as one:
        assert list((await a_life(one, maker, fake))["ends"]) == [what]
        assert await one.next() == {}
        assert one.process.wait(10) == 0


async def test_one_that_has_been_a_shim_often_enough_ends(maker, fake, registry):
    places = maker.directory / "state" / "w"
    places.mkdir()
    with Single(places, "pass") as one:
        assert (await a_life(one, maker, fake))["waiting"] == one.pid
        assert await a_life(one, maker, fake) == {}
        assert one.process.wait(10) == 0
    assert not one.socket.exists()


async def test_one_whose_connection_is_gone_ends_with_its_container(maker, fake, registry):
    places = maker.directory / "state" / "w"
    places.mkdir()
    again = Again(maker._factory, places)
    shim = await again.be(maker, maker.bundle(plain_spec("/bin/sleep", "1000")))
    again.connection.close()
    await live(shim, fake)
    await shim.shutdown()
    await again.ended()
    assert not again.socket.exists()
    await shim.close()


async def test_one_that_was_executed_anew_ends_with_its_container(maker, fake, again):
    shim = await again.be(maker, maker.bundle(plain_spec("/bin/sleep", "1000")))
    await shim.create(binary=fake.path)
    await shim.start()
    await shim.reexec()
    assert await again.next() == {}
    await shim.kill()
    await shim.wait()
    await shim.delete()
    await shim.shutdown()
    await shim.ended()
    await shim.close()


async def test_a_stranger_gets_nothing_out_of_one_that_waits(maker):
    waiting = maker.waiting()
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.settimeout(10)
        stranger.connect(str(waiting.socket))
        stranger.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        assert stranger.recv(1) == b""
    waiting.connection.close()
    await waiting.ended()


async def test_one_that_is_told_nonsense_says_so_and_ends(maker):
    for request, words in (
        ({"namespace": 1}, "must be a string"),
        (maker.request(maker.directory / "no-such-bundle"), "No such file"),
    ):
        waiting = maker.waiting()
        assert words in waiting.ask(request)["error"]
        await waiting.ended()
        waiting.connection.close()
        assert not waiting.socket.exists()


@pytest.mark.parametrize("place", ["relative", 3, "/no/such/directory", "/" + "x" * 200])
def test_a_place_that_cannot_be_is_refused(factory, place):
    answer = factory.ask({"wait_in": place})
    assert answer["error"]


async def test_terminated_while_it_waits_it_leaves_at_once(maker):
    waiting = maker.waiting()
    os.kill(waiting.pid, signal.SIGTERM)
    await waiting.ended()
    waiting.connection.close()
    assert not waiting.socket.exists()
