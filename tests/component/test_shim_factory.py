"""The factory: requests good and bad, what a shim is born with, and the end of both."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from protos.theseus.shim.v1 import control_pb2
from services.common import errors
from services.common.linux import process_start_time
from services.shim.shim_cgroup import PATH, ROOT
from tests.fakes.eventually import eventually
from tests.fakes.shim_harness import REPOSITORY, FactoryProcess, KeeperProcess, plain_spec


@pytest.fixture
async def factory(tmp_path):
    factory = FactoryProcess(tmp_path)
    yield factory
    if factory.process.poll() is None:
        assert factory.stop() == 0


@pytest.fixture
def keeper(tmp_path):
    keeper = KeeperProcess(tmp_path)
    yield keeper
    keeper.leave()


async def test_answer_comes_when_the_shim_serves_and_names_it(maker):
    bundle = maker.bundle(plain_spec("/bin/true"))
    (bundle / "shim.json").write_text(json.dumps({"instance_id": "1" * 32, "more": 1}))
    request = maker.request(bundle, instance_id="1" * 32)
    answer = maker._factory.ask(request)
    assert answer["address"] == f"unix://{request['socket']}"
    assert answer["start_time"] == process_start_time(answer["pid"])
    assert answer["version"]
    with socket.socket(socket.AF_UNIX) as probe:
        probe.connect(request["socket"])  # it serves already
    # That it is in the bundle is not waited for.
    await eventually(lambda: "pid" in json.loads((bundle / "shim.json").read_text()))
    known = json.loads((bundle / "shim.json").read_text())
    assert known["more"] == 1
    assert (known["pid"], known["instance_id"]) == (answer["pid"], "1" * 32)
    assert known["boot_id"] == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    os.kill(answer["pid"], signal.SIGTERM)


async def test_shim_is_detached_from_the_factory(maker, factory, keeper):
    bundle = maker.bundle(plain_spec("/bin/true"))
    shim = await maker.start(bundle, keeper=str(keeper.socket))
    assert os.getsid(shim.pid) == shim.pid
    assert Path(f"/proc/{shim.pid}/comm").read_text().strip() == "theseus-shim"
    targets = {str(Path(f"/proc/{shim.pid}/fd/{fd}").readlink()) for fd in range(3)}
    assert targets == {"/dev/null", str(shim.bundle / "shim.log")}
    open_files = {str(entry.readlink()) for entry in Path(f"/proc/{shim.pid}/fd").iterdir()}
    assert not any("factory" in name for name in open_files)
    assert factory.stop() == 0
    assert not factory.socket.exists()
    info = await shim.info()
    assert (info.pid, info.id, info.namespace) == (shim.pid, shim.id, "test")
    assert not info.registered
    # Of those in the shims' cgroup the keeper leaves last: it is the one that removes it.
    os.kill(shim.pid, signal.SIGTERM)
    await shim.ended()
    keeper.leave()
    await eventually(lambda: not any(ROOT.glob(f"*/{PATH}")))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\xff\xfe", "not valid JSON"),
        (b"[1]", "not a JSON object"),
        (b"{}", "'namespace' is missing"),
        (b'{"namespace": 1}', "must be a string"),
        (b"x" * 70000, "larger than"),
    ],
)
async def test_garbage_gets_an_answer_and_the_factory_goes_on(maker, data, words):
    assert words in maker._factory.ask(data)["error"]
    await maker.start(maker.bundle(plain_spec("/bin/true")))


async def test_bundle_or_socket_that_cannot_be_is_told(maker, tmp_path):
    request = maker.request(tmp_path / "no-such-bundle")
    assert "no-such-bundle" in maker._factory.ask(request)["error"]
    bundle = maker.bundle(plain_spec("/bin/true"))
    request = maker.request(bundle, socket="/" + "s" * 120)
    assert "at most 107" in maker._factory.ask(request)["error"]
    request = maker.request(bundle, socket=str(tmp_path / "missing" / "sock"))
    assert "error" in maker._factory.ask(request)


async def test_silent_and_broken_clients_hold_up_nobody(maker, factory):
    silent = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    silent.connect(str(factory.socket))
    gone = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    gone.connect(str(factory.socket))
    gone.close()
    await maker.start(maker.bundle(plain_spec("/bin/true")))
    silent.close()
    await maker.start(maker.bundle(plain_spec("/bin/true")))


async def test_factory_leaves_no_zombies(maker, factory):
    for _ in range(3):
        shim = await maker.start(maker.bundle(plain_spec("/bin/true")))
        os.kill(shim.pid, signal.SIGTERM)
        await shim.ended()
    await maker.start(maker.bundle(plain_spec("/bin/true")))
    children = Path(f"/proc/{factory.process.pid}/task/{factory.process.pid}/children")
    assert len(children.read_text().split()) == 1


async def test_new_factory_takes_over_the_path_and_the_old_one_leaves_it_alone(tmp_path):
    old = FactoryProcess(tmp_path)
    inode = old.socket.stat().st_ino
    new = FactoryProcess(tmp_path, wait=False)
    await eventually(lambda: new.socket.stat().st_ino != inode)
    assert old.stop() == 0
    assert "not valid JSON" in new.ask(b"?")["error"]
    assert new.stop() == 0
    assert not new.socket.exists()


async def test_health_and_reflection_are_served(maker):
    from grpc_health.v1 import health_pb2, health_pb2_grpc
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    shim = await maker.start(maker.bundle(plain_spec("/bin/true")))
    health = health_pb2_grpc.HealthStub(shim.channel)
    answer = await health.Check(
        health_pb2.HealthCheckRequest(service="containerd.task.v3.Task"), timeout=10
    )
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    call = reflection_pb2_grpc.ServerReflectionStub(shim.channel).ServerReflectionInfo(timeout=10)
    await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
    listed = {service.name for service in (await call.read()).list_services_response.service}
    call.cancel()
    assert {
        "containerd.task.v2.Task",
        "containerd.task.v3.Task",
        "theseus.shim.v1.Streams",
        "theseus.shim.v1.Control",
        "grpc.health.v1.Health",
    } <= listed


async def test_signals_end_a_shim_only_while_it_has_no_container(maker, tmp_path):
    from tests.fakes.runtime import install

    fake = install(tmp_path / "fake")
    shim = await maker.start(maker.bundle(plain_spec("/bin/sleep", "1000")))
    await shim.create(binary=fake.path)
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(shim.pid, signum)
    await shim.start()
    assert (await shim.info()).pid == shim.pid
    await shim.kill()
    await shim.wait()
    await shim.delete()
    os.kill(shim.pid, signal.SIGTERM)
    await shim.ended()
    assert not Path(shim.request["socket"]).exists()


async def test_metrics_and_unknown_containers(maker):
    shim = await maker.start(maker.bundle(plain_spec("/bin/true")))
    page = await shim.metrics()
    assert "theseus_shim_spool_length 0.0" in page
    assert "theseus_shim_registered 0.0" in page
    with pytest.raises(errors.NotFound, match="is not created"):
        await shim.state()
    call = shim.control.ReopenLog(control_pb2.ReopenLogRequest(container_id="x"), timeout=10)
    with pytest.raises(Exception, match="NOT_FOUND"):
        await call
    assert 'grpc_method="State",grpc_service="containerd.task.v3.Task"' in await shim.metrics()


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "services.shim", *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_command_line_tells_version_and_probes():
    assert run("--version").stdout.startswith("theseus-shim ")
    probed = run("probe", "--runtime", "no-such-runtime")
    assert json.loads(probed.stdout)[0]["usable"] is False
    assert run("no-such-command").returncode == 2
    bad = run("serve", "--namespace", "", "--id", "x", "--bundle", "/b", "--socket", "/s",
              "--registry", "/r")  # fmt: skip
    assert (bad.returncode, "'namespace' is empty" in bad.stderr) == (1, True)


async def test_shim_serves_without_a_factory(maker, tmp_path):
    bundle = maker.bundle(plain_spec("/bin/true"))
    path = str(tmp_path / "state" / "s" / "alone")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.shim", "serve", "--namespace", "n", "--id", "x",
        "--bundle", str(bundle), "--socket", path, "--registry", str(maker.registry_socket),
        cwd=REPOSITORY, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    assert json.loads(await process.stdout.readline())["address"] == f"unix://{path}"
    process.send_signal(signal.SIGTERM)
    assert await process.wait() == 0
