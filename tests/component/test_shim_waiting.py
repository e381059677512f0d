"""Shims that wait ready: they become shims like any other, or end, and leave nothing."""

from __future__ import annotations

import json
import os
import signal
import socket
from pathlib import Path

import pytest

from protos.containerd.task.v3 import shim_pb2
from services.common import errors
from tests.fakes.eventually import eventually
from tests.fakes.registry_server import FakeRegistry
from tests.fakes.shim_harness import RunningShim, ShimMaker, plain_spec


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
