"""Sandboxes through containerd's API, held by our shim, with real containers in them."""

import json
import os
import signal
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
import pytest_asyncio
from google.protobuf.any_pb2 import Any as AnyMessage

from protos.containerd.services.containers.v1 import containers_pb2, containers_pb2_grpc
from protos.containerd.services.events.v1 import events_pb2, events_pb2_grpc
from protos.containerd.services.sandbox.v1 import sandbox_pb2 as pb
from protos.containerd.services.sandbox.v1 import sandbox_pb2_grpc
from protos.containerd.services.tasks.v1 import tasks_pb2, tasks_pb2_grpc
from protos.containerd.types import sandbox_pb2
from protos.theseus.shim.v1 import upgrades_pb2, upgrades_pb2_grpc
from services.common.client import connect
from tests.fakes.containerd import ContainerdProcess, node_directory
from tests.fakes.stock_shim import parent_of
from tests.integration.theseus import ended, until
from tools import leaks

pytestmark = [pytest.mark.root, pytest.mark.asyncio(loop_scope="module")]

NAMESPACE = "pods"
RUNTIME = "io.containerd.runc.v2"
STOCK = "/usr/bin/containerd-shim-runc-v2"
CALL = {"timeout": 20}


class Node(ContainerdProcess):
    """Our containerd, and stubs for it."""

    @asynccontextmanager
    async def stubs(self):
        async with connect(self.address, namespace=NAMESPACE) as channel:
            self.controller = sandbox_pb2_grpc.ControllerStub(channel)
            self.store = sandbox_pb2_grpc.StoreStub(channel)
            self.containers = containers_pb2_grpc.ContainersStub(channel)
            self.tasks = tasks_pb2_grpc.TasksStub(channel)
            self.events = events_pb2_grpc.EventsStub(channel)
            yield self

    async def create(self, sandbox_id="pod", runtime=RUNTIME, **fields):
        sandbox = sandbox_pb2.Sandbox(
            sandbox_id=sandbox_id, runtime=sandbox_pb2.Sandbox.Runtime(name=runtime)
        )
        request = pb.ControllerCreateRequest(
            sandbox_id=sandbox_id, sandbox=sandbox, sandboxer="shim", **fields
        )
        return await self.controller.Create(request, **CALL)

    async def ask(self, method, sandbox_id="pod", **fields):
        request = getattr(pb, f"Controller{method}Request")(
            sandbox_id=sandbox_id, sandboxer="shim", **fields
        )
        return await getattr(self.controller, method)(request, **CALL)

    async def container(self, name, sandbox_id="pod"):
        """A container of busybox in the sandbox; returns init's pid."""
        rootfs = self.directory / "rootfs" / "bin"
        if not rootfs.exists():
            rootfs.mkdir(parents=True)
            (rootfs.parent / "proc").mkdir()
            (rootfs / "busybox").write_bytes(Path("/bin/busybox").read_bytes())
            (rootfs / "busybox").chmod(0o755)
        spec = {
            "ociVersion": "1.0.2",
            "process": {
                "user": {"uid": 0, "gid": 0},
                "args": ["/bin/busybox", "sleep", "1000"],
                "cwd": "/",
            },
            "root": {"path": str(rootfs.parent)},
            "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
            "linux": {"namespaces": [{"type": kind} for kind in ("pid", "mount", "ipc")]},
        }
        record = containers_pb2.Container(
            id=name,
            runtime=containers_pb2.Container.Runtime(name=RUNTIME),
            spec=AnyMessage(type_url="spec", value=json.dumps(spec).encode()),
            sandbox=sandbox_id,
        )
        create = containers_pb2.CreateContainerRequest(container=record)
        await self.containers.Create(create, **CALL)
        made = await self.tasks.Create(tasks_pb2.CreateTaskRequest(container_id=name), **CALL)
        await self.tasks.Start(tasks_pb2.StartRequest(container_id=name), **CALL)
        return made.pid

    async def remove_container(self, name):
        kill = tasks_pb2.KillRequest(container_id=name, signal=signal.SIGKILL)
        await self.tasks.Kill(kill, **CALL)
        await self.tasks.Wait(tasks_pb2.WaitRequest(container_id=name), **CALL)
        await self.tasks.Delete(tasks_pb2.DeleteTaskRequest(container_id=name), **CALL)
        await self.containers.Delete(containers_pb2.DeleteContainerRequest(id=name), **CALL)


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def running():
    before = leaks.taken()
    async with node_directory() as directory, Node(directory) as node:
        yield node
        assert await node.stop() == 0
    until(lambda: not [trace for trace in leaks.taken().beyond(before) if "processes" in trace])
    leaks.clear(before)


@pytest_asyncio.fixture(loop_scope="module")
async def node(running):
    async with running.stubs():
        yield running
    bundles = running.directory / "s" / "tasks" / NAMESPACE
    until(lambda: not bundles.exists() or not list(bundles.iterdir()))


async def fails(call, code, *texts):
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await call
    assert failure.value.code() is code, failure.value.details()
    for text in texts:
        assert text in failure.value.details()


async def test_a_sandbox_from_create_to_shutdown(node):
    listening = node.events.Subscribe(
        events_pb2.SubscribeRequest(filters=['topic~="^/sandboxes/"']), timeout=30
    )
    assert (await node.create()).sandbox_id == "pod"
    status = await node.ask("Status")
    assert (status.state, status.sandbox_id) == ("SANDBOX_NOTREADY", "pod")
    started = await node.ask("Start")
    assert started.created_at == status.created_at
    assert started.address.startswith("grpc+unix:///")
    status = await node.ask("Status", verbose=True)
    assert (status.state, status.pid, status.info["netnsPath"]) == (
        "SANDBOX_READY",
        started.pid,
        "",
    )
    assert (await node.ask("Platform")).platform.os == "linux"
    assert (await node.ask("Metrics")).metrics.id == "pod"
    await node.ask("Update", sandbox=sandbox_pb2.Sandbox(sandbox_id="pod"))
    waiting = node.controller.Wait(
        pb.ControllerWaitRequest(sandbox_id="pod", sandboxer="shim"), **CALL
    )
    await node.ask("Stop")
    assert (await waiting).exit_status == 0
    assert (await node.ask("Status")).state == "SANDBOX_NOTREADY"
    await node.ask("Stop")
    await node.ask("Shutdown")
    ended(started.pid)
    assert (await node.ask("Status")).exited_at.seconds > 0
    await node.ask("Stop")
    await fails(node.ask("Shutdown"), grpc.StatusCode.NOT_FOUND, "sandbox 'pod' not found")
    topics = []
    async for envelope in listening:
        topics.append(envelope.topic)
        if envelope.topic == "/sandboxes/exit":
            listening.cancel()
            break
    assert topics == ["/sandboxes/create", "/sandboxes/start", "/sandboxes/exit"]


async def test_what_cannot_be_is_refused_and_leaves_nothing(node):
    code = grpc.StatusCode
    request = pb.ControllerStatusRequest(sandbox_id="pod")
    await fails(node.controller.Status(request, **CALL), code.INVALID_ARGUMENT, "'shim'")
    request.sandboxer = "other"
    await fails(node.controller.Status(request, **CALL), code.NOT_FOUND, "'other'")
    await fails(node.create("not/a/name"), code.INVALID_ARGUMENT)
    await fails(node.create(runtime=""), code.INVALID_ARGUMENT, "names no runtime")
    await fails(node.create(runtime="io.none.none.v1"), code.NOT_FOUND, "containerd-shim-none-v1")
    await fails(node.create(netns_path="/none"), code.INVALID_ARGUMENT, "/none")
    await fails(node.create(runtime=STOCK), code.UNIMPLEMENTED, "has no sandboxes")
    for method in ("Start", "Wait", "Platform", "Metrics", "Shutdown"):
        await fails(node.ask(method), code.NOT_FOUND, "sandbox 'pod' not found")
    await node.create()
    await fails(node.create(), code.ALREADY_EXISTS, "already runs")
    await node.ask("Start")
    await fails(node.ask("Start"), code.FAILED_PRECONDITION, "was started before")
    # As upstream: one that could not be started is taken away.
    until(lambda: not list((node.directory / "s" / "tasks" / NAMESPACE).iterdir()))


async def test_containers_come_and_go_in_a_sandbox_over_restarts(node):
    await node.create(netns_path="/proc/self/ns/net")
    shim = (await node.ask("Start")).pid
    first = await node.container("one")
    assert parent_of(first) == shim
    await node.remove_container("one")
    await node.kill()
    await node.start()
    async with node.stubs():
        status = await node.ask("Status", verbose=True)
        assert (status.pid, status.state) == (shim, "SANDBOX_READY")
        assert status.info["netnsPath"] == "/proc/self/ns/net"
        assert any("net:[" in str(fd.readlink()) for fd in Path(f"/proc/{shim}/fd").iterdir())
        second = await node.container("two")
        assert parent_of(second) == shim
        waiting = node.controller.Wait(
            pb.ControllerWaitRequest(sandbox_id="pod", sandboxer="shim"), **CALL
        )
        await node.ask("Stop")
        assert (await waiting).exit_status == 0
        await node.ask("Shutdown")
        # Its containers have their shim until they are deleted.
        assert parent_of(second) == shim
        await node.remove_container("two")
        ended(shim)


async def test_a_sandbox_outlives_the_upgrade_of_its_shim(node):
    await node.create(netns_path="/proc/self/ns/net")
    shim = (await node.ask("Start")).pid
    container = await node.container("one")
    waiting = node.controller.Wait(
        pb.ControllerWaitRequest(sandbox_id="pod", sandboxer="shim"), timeout=60
    )
    async with connect(node.address, namespace=NAMESPACE) as channel:
        upgrade = upgrades_pb2_grpc.UpgradesStub(channel).UpgradeShims(
            upgrades_pb2.UpgradeShimsRequest(), timeout=60
        )
        answers = [answer async for answer in upgrade]
    assert [answer.error for answer in answers] == [""] * len(answers)
    assert answers
    status = await node.ask("Status", verbose=True)
    assert (status.pid, status.state) == (shim, "SANDBOX_READY")
    assert any("net:[" in str(fd.readlink()) for fd in Path(f"/proc/{shim}/fd").iterdir())
    assert parent_of(container) == shim
    await node.remove_container("one")
    await node.ask("Shutdown")
    assert (await waiting).exit_status == 0
    ended(shim)


async def test_a_removal_that_goes_on_after_a_restart_leaves_the_others(node):
    await node.create()
    shim = (await node.ask("Start")).pid
    one, two = await node.container("one"), await node.container("two")
    await node.kill()
    bundles = node.directory / "s" / "tasks" / NAMESPACE
    (bundles / "one" / "deleting").write_text("{}")
    await node.start()
    async with node.stubs():
        ended(one)
        until(lambda: not (bundles / "one").exists())
        assert (await node.ask("Status")).pid == shim == parent_of(two)
        delete = containers_pb2.DeleteContainerRequest(id="one")
        await node.containers.Delete(delete, **CALL)
        await node.remove_container("two")
        await node.ask("Shutdown")
        ended(shim)


async def test_with_its_shim_a_sandbox_has_exited(node):
    await node.create()
    os.kill((await node.ask("Start")).pid, signal.SIGKILL)
    bundles = node.directory / "s" / "tasks" / NAMESPACE
    until(lambda: not list(bundles.iterdir()))
    assert (await node.ask("Status")).exited_at.seconds > 0
    await fails(node.ask("Wait"), grpc.StatusCode.NOT_FOUND)
    await node.create()
    await node.ask("Shutdown")
