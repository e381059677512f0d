"""Registration: events are delivered once and in order, whatever becomes of containerd."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import signal
import socket
import sys
from pathlib import Path

import grpc
import pytest

from services.common.ttrpc.server import TtrpcServer, methods
from tests.fakes import registry_server
from tests.fakes.eventually import eventually
from tests.fakes.registry_server import FakeRegistry
from tests.fakes.shim_harness import plain_spec


@pytest.fixture(params=[False, True], ids=["ttrpc", "grpc"], autouse=True)
def older(request, monkeypatch):
    monkeypatch.setattr(registry_server, "OLDER", request.param)


def spool(shim):
    return sorted(int(path.name) for path in (shim.bundle / "spool").iterdir())


async def run_to_the_end(shim, fake):
    await shim.create(binary=fake.path)
    await shim.start()
    return (await shim.wait()).exit_status


async def test_hello_says_everything(maker, fake):
    registry = FakeRegistry(maker.registry_socket)
    shim = await maker.start(maker.bundle(plain_spec("/bin/sleep", "1000")))
    await shim.create(binary=fake.path, stdin="theseus-stream:")
    started = await shim.start()
    await shim.exec("e", ["/bin/true"])
    await shim.wait("e")
    await registry.start()
    await registry.wait_for(lambda r: r.hellos)
    hello = registry.hellos[0]
    assert (hello.namespace, hello.id, hello.pid) == ("test", shim.id, shim.pid)
    assert hello.instance_id == shim.request["instance_id"]
    assert hello.address == f"unix://{shim.request['socket']}"
    assert (hello.protocol_min, hello.protocol_max) == (1, 1)
    assert hello.bundle == str(shim.bundle)
    init, process = hello.processes
    assert (init.exec_id, init.pid, init.status) == ("", started.pid, "running")
    assert (init.streams.stdin, init.streams.terminal) == ("theseus-stream:", False)
    assert (process.exec_id, process.status, process.exit_status) == ("e", "stopped", 0)
    assert (hello.first_seq, hello.last_seq) == (1, 5)
    await registry.wait_for(lambda r: len(r.events) == 5)
    assert registry.topics() == [
        "/tasks/create",
        "/tasks/start",
        "/tasks/exec-added",
        "/tasks/exec-started",
        "/tasks/exit",
    ]
    await registry.stop()


async def test_exit_while_containerd_is_away_is_told_when_it_returns(maker, fake):
    registry = FakeRegistry(maker.registry_socket)
    await registry.start()
    shim = await maker.start(maker.bundle(plain_spec("/bin/sh", "-c", "read x; exit 42")))
    await shim.create(binary=fake.path, stdin="theseus-stream:")
    await shim.start()
    await registry.wait_for_topic("/tasks/start")
    await registry.stop()
    async with shim.attach(input=True) as attached:
        await attached.write(0, b"\n")
        assert (await shim.wait()).exit_status == 42
    assert json.loads((shim.bundle / "spool" / "3").read_text())["fields"]["exit_status"] == 42
    returned = FakeRegistry(maker.registry_socket, epoch=2, events=registry.events)
    await returned.start()
    assert (await returned.wait_for_topic("/tasks/exit")).exit_status == 42
    assert [event.seq for event in returned.events] == [1, 2, 3]
    assert returned.raw_count == 1  # what was acknowledged is not sent again
    await eventually(lambda: info_says(shim, epoch=2, registered=True))
    await returned.stop()


async def info_says(shim, *, epoch, registered):
    info = await shim.info()
    return (info.epoch, info.registered) == (epoch, registered)


async def test_what_is_not_acknowledged_stays_and_is_sent_again(maker, fake):
    silent = FakeRegistry(maker.registry_socket, acknowledge=False)
    await silent.start()
    shim = await maker.start(maker.bundle(plain_spec("/bin/true")))
    assert await run_to_the_end(shim, fake) == 0
    await silent.wait_for_topic("/tasks/exit")
    assert spool(shim) == [1, 2, 3]
    await silent.stop()
    # It journaled only the first before it died.
    returned = FakeRegistry(maker.registry_socket, epoch=2, events=silent.events[:1])
    await returned.start()
    await returned.wait_for_topic("/tasks/exit")
    assert [event.seq for event in returned.events] == [1, 2, 3]
    assert returned.hellos[0].first_seq == 1

    await eventually(lambda: spool(shim) == [3])
    await shim.delete()
    await returned.wait_for_topic("/tasks/delete")
    assert [event.seq for event in returned.events] == [1, 2, 3, 4]
    await returned.stop()


async def test_older_epoch_is_refused(maker, fake):
    new = FakeRegistry(maker.registry_socket, epoch=7)
    await new.start()
    shim = await maker.start(maker.bundle(plain_spec("/bin/true")))
    await run_to_the_end(shim, fake)
    await new.wait_for_topic("/tasks/exit")
    await new.stop()
    old = FakeRegistry(maker.registry_socket, epoch=6)
    await old.start()
    await shim.delete()
    await old.wait_for(lambda r: len(r.hellos) >= 2)  # it asks again, and refuses again
    assert old.events == []
    assert not (await shim.info()).registered
    assert "theseus_shim_refused_epochs_total" in await shim.metrics()
    await old.stop()
    newest = FakeRegistry(maker.registry_socket, epoch=7, events=new.events)
    await newest.start()
    await newest.wait_for_topic("/tasks/delete")
    await newest.stop()


async def test_directory_of_the_socket_goes_and_comes_back(maker, fake, tmp_path):
    directory = tmp_path / "other" / "run"
    path = directory / "containerd.sock"
    bundle = maker.bundle(plain_spec("/bin/true"))
    shim = await maker.start(bundle, registry=str(path))
    for epoch in (1, 2, 3):
        registry = FakeRegistry(path, epoch=epoch)
        await registry.start()
        await registry.wait_for(lambda r: r.hellos)
        await registry.stop()
        shutil.rmtree(directory.parent)
    assert (await shim.info()).epoch in (2, 3)


def is_watching(shim) -> bool:
    for descriptor in Path(f"/proc/{shim.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            if "inotify" in str(descriptor.readlink()):
                return True
    return False


async def test_registered_shim_watches_nothing(maker, fake):
    registry = FakeRegistry(maker.registry_socket)
    await registry.start()
    shim = await maker.start(maker.bundle(plain_spec("/bin/true")))
    await registry.wait_for(lambda r: r.hellos)
    await eventually(lambda: not is_watching(shim))
    await registry.stop()
    await eventually(lambda: is_watching(shim))
    returned = FakeRegistry(maker.registry_socket, epoch=2)
    await returned.start()
    await returned.wait_for(lambda r: r.hellos)
    await eventually(lambda: not is_watching(shim))
    await returned.stop()


async def test_containerd_that_returns_is_found_at_once(maker, fake):
    shim = await maker.start(maker.bundle(plain_spec("/bin/true")))
    await asyncio.sleep(1.5)  # the pause between two looks is at its longest
    took = []
    for epoch in range(1, 4):
        registry = FakeRegistry(maker.registry_socket, epoch=epoch)
        await registry.start()
        began = asyncio.get_running_loop().time()
        await registry.wait_for(lambda r: r.hellos)
        took.append(asyncio.get_running_loop().time() - began)
        await registry.stop()
        await asyncio.sleep(0.3)
    assert min(took) < 0.25
    assert (await shim.info()).epoch == 3


class Containerd:
    """A fake containerd in a process of its own, to be killed."""

    def __init__(self, socket: Path, journal: Path) -> None:
        self.socket = socket
        self.journal = journal
        self.epoch = 0

    async def start(self):
        self.epoch += 1
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, registry_server.__file__, str(self.socket), str(self.journal),
            str(self.epoch), stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        assert await self.process.stdout.readline() == b"serving\n"

    async def kill(self):
        self.process.send_signal(signal.SIGKILL)
        await self.process.wait()

    def journaled(self):
        if not self.journal.exists():
            return []
        return [json.loads(line) for line in self.journal.read_text().splitlines()]


async def test_sigkill_of_containerd_loses_and_doubles_nothing(maker, fake, tmp_path):
    containerd = Containerd(maker.registry_socket, tmp_path / "journal")
    await containerd.start()
    shims = []
    for code in range(6):
        bundle = maker.bundle(plain_spec("/bin/sh", "-c", f"exit {code + 10}"))
        shims.append(await maker.start(bundle))

    async def run_all():
        for shim in shims:
            await run_to_the_end(shim, fake)

    running = asyncio.create_task(run_all())
    for _ in range(3):
        await asyncio.sleep(0.25)
        await containerd.kill()
        await containerd.start()
    await running

    def exits():
        return [e for e in containerd.journaled() if e["topic"] == "/tasks/exit"]

    await eventually(lambda: len(exits()) == 6)
    await containerd.kill()
    told = containerd.journaled()
    for code, shim in enumerate(shims):
        mine = [entry for entry in told if entry["instance"] == shim.request["instance_id"]]
        assert [entry["seq"] for entry in mine] == [1, 2, 3]
        assert mine[-1]["exit_status"] == code + 10


async def test_shim_ends_by_itself_after_its_last_container_once_all_is_acknowledged(maker, fake):
    shim = await maker.start(maker.bundle(plain_spec("/bin/true")), linger_s=0.05)
    await run_to_the_end(shim, fake)
    await shim.delete()
    with pytest.raises(TimeoutError):
        await shim.ended(0.3)  # nobody has acknowledged
    registry = FakeRegistry(maker.registry_socket)
    await registry.start()
    await shim.ended()
    assert registry.topics()[-1] == "/tasks/delete"
    assert not Path(shim.request["socket"]).exists()
    await registry.stop()


async def test_shutdown_waits_for_acknowledgements_unless_it_is_now(maker, fake):
    shim = await maker.start(maker.bundle(plain_spec("/bin/true")))
    await run_to_the_end(shim, fake)
    await shim.shutdown(now=True)  # it has a container: nothing happens, as upstream
    await shim.delete()
    await shim.shutdown()
    with pytest.raises(TimeoutError):
        await shim.ended(0.2)
    await shim.shutdown(now=True)
    await shim.ended()


@pytest.mark.parametrize("older", [True], ids=["grpc"], indirect=True)
async def test_an_older_containerd_has_a_ttrpc_socket_without_a_register(maker, fake):
    registry = FakeRegistry(maker.registry_socket)
    await registry.start()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(maker.registry_socket.with_name("containerd.sock.ttrpc")))
    listener.listen()
    events = TtrpcServer(methods({}))
    await events.start(listener)
    shim = await maker.start(maker.bundle(plain_spec("/bin/sh", "-c", "exit 3")))
    assert await run_to_the_end(shim, fake) == 3
    await registry.wait_for_topic("/tasks/exit")
    await events.stop()
    await registry.stop()


@pytest.mark.parametrize("older", [True], ids=["grpc"], indirect=True)
async def test_a_register_that_is_not_there_is_asked_for_again(maker, fake):
    server = grpc.aio.server()
    maker.registry_socket.parent.mkdir(parents=True, exist_ok=True)
    server.add_insecure_port(f"unix:{maker.registry_socket}")
    await server.start()
    shim = await maker.start(maker.bundle(plain_spec("/bin/sh", "-c", "exit 3")))
    assert await run_to_the_end(shim, fake) == 3
    log = shim.bundle / "shim.log"
    await eventually(lambda: "has no register" in log.read_text())
    await server.stop(0)
    registry = FakeRegistry(maker.registry_socket)
    await registry.start()
    await registry.wait_for_topic("/tasks/exit")
    await registry.stop()
