"""Tasks with the real factory, shims and runtimes: restarts, dead shims, nothing left behind."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage

from protos.containerd.services.tasks.v1 import tasks_pb2 as pb
from protos.containerd.types import mount_pb2
from protos.containerd.types.runc.options import oci_pb2
from protos.containerd.types.task import task_pb2
from protos.theseus.shim.v1 import streams_pb2
from services.common.rpc_errors import from_rpc_error
from services.containerd.containers.store import Container
from services.containerd.rpc.encoding import decode_event
from services.containerd.tasks.bundle import unmount_beneath
from services.containerd.tasks.factory import FactoryClient
from services.containerd.typed import TypedValue
from tests.fakes.task_node import NS, SPEC, TaskNode

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = pytest.mark.root

PROGRAM = (sys.executable, "-m", "services.shim")


def make_rootfs(path: Path) -> Path:
    (path / "bin").mkdir(parents=True)
    for name in ("proc", "dev", "sys", "tmp"):
        (path / name).mkdir()
    busybox = shutil.which("busybox")
    assert busybox is not None, "busybox-static is a prerequisite of the suite"
    shutil.copy(busybox, path / "bin" / "busybox")
    for name in ("sh", "sleep", "cat", "echo"):
        (path / "bin" / name).symlink_to("busybox")
    return path


def make_spec(container_id: str, *args: str) -> bytes:
    kinds = ("pid", "mount", "ipc", "uts", "network")
    return json.dumps(
        {
            "ociVersion": "1.0.2",
            "process": {
                "user": {"uid": 0, "gid": 0},
                "args": args,
                "env": ["PATH=/bin"],
                "cwd": "/",
            },
            "root": {"path": "rootfs"},
            "hostname": "task",
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs"},
            ],
            "linux": {
                "namespaces": [{"type": kind} for kind in kinds],
                "cgroupsPath": f"/theseus-tasks/{container_id}",
            },
        }
    ).encode()


class Node(TaskNode):
    """A node whose shims are real."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.rootfs = make_rootfs(root / "rootfs")
        self.launcher: FactoryClient

    async def start(self, *, serve: bool = True) -> None:
        self.launcher = FactoryClient(
            PROGRAM, socket=self.state / "f.sock", registry=self.socket, log_level="debug"
        )
        await super().start(serve=serve)
        self.tasks._launchers = {"io.containerd.runc.v2": self.launcher}
        await self._stack.enter_async_context(self.launcher)

    async def create(
        self, container_id: str, *args: str, runtime: str = "runc", **fields: Any
    ) -> int:
        await self.metadata.containers.create(
            NS,
            Container(
                id=container_id,
                runtime_name="io.containerd.runc.v2",
                spec=TypedValue(SPEC.type_url, make_spec(container_id, *args)),
            ),
        )
        options = oci_pb2.Options(binary_name=runtime)
        request = pb.CreateTaskRequest(
            container_id=container_id,
            rootfs=[mount_pb2.Mount(type="bind", source=str(self.rootfs), options=["rbind", "rw"])],
            options=AnyMessage(
                type_url=options.DESCRIPTOR.full_name, value=options.SerializeToString()
            ),
            **fields,
        )
        async with self.client() as client:
            return (await client.tasks.Create(request, timeout=30)).pid

    async def call(self, method: str, container_id: str, **fields: Any) -> Any:
        kinds = {
            "Start": pb.StartRequest,
            "Wait": pb.WaitRequest,
            "Delete": pb.DeleteTaskRequest,
            "Get": pb.GetRequest,
            "Kill": pb.KillRequest,
            "Pause": pb.PauseTaskRequest,
            "ListPids": pb.ListPidsRequest,
            "Exec": pb.ExecProcessRequest,
        }
        async with self.client() as client:
            request = kinds[method](container_id=container_id, **fields)
            try:
                return await getattr(client.tasks, method)(request, timeout=30)
            except grpc.aio.AioRpcError as error:
                raise from_rpc_error(error) from None

    def shim_pid(self, container_id: str) -> int:
        process = self.bundles.find(NS, container_id).process()
        assert process is not None
        return process.pid

    async def assert_clean(self) -> None:
        async with asyncio.timeout(10):
            await self.shims_removed()
        assert list((self.state / "tasks" / NS).iterdir()) == []
        assert list((self.state / "s").iterdir()) == []
        assert str(self.state) not in Path("/proc/self/mountinfo").read_text()
        left = [path for path in Path("/sys/fs/cgroup").glob("*/theseus-tasks/*") if path.is_dir()]
        assert left == []
        assert list((self.state / "runtime").glob("*/*/*")) == []

    async def close(self) -> None:
        for known in self.shims.all(NS):
            if known.dismissed is not None:
                continue
            if known.process is not None and known.process.alive():
                for process in await known.shim.pids() if known.shim else ():
                    with suppress(ProcessLookupError):
                        os.kill(process.pid, signal.SIGKILL)
                await self.tasks.wait(NS, known.id)
            await self.tasks.delete(NS, known.id)
        async with asyncio.timeout(10):
            await self.shims_removed()
        await super().close()
        unmount_beneath(self.state)
        for path in Path("/sys/fs/cgroup").glob("*/theseus-tasks"):
            path.rmdir()


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    node = Node(tmp_path)
    await node.start()
    yield node
    await node.close()


async def test_a_real_container_from_create_to_delete(node: Node, runtime: str) -> None:
    out = f"file://{node.root}/out"
    command = ("sh", "-c", "echo hello; exit 42")
    pid = await node.create("c1", *command, runtime=runtime, stdout=out, stderr=out)
    assert (await node.call("Get", "c1")).process.status == task_pb2.CREATED
    assert (await node.call("Start", "c1")).pid == pid
    assert (await node.call("Wait", "c1")).exit_status == 42
    assert (await node.call("Get", "c1")).process.status == task_pb2.STOPPED
    assert (await node.call("Delete", "c1")).exit_status == 42
    assert (node.root / "out").read_text() == "hello\n"
    assert await node.topics() == ["/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"]
    await node.assert_clean()


async def test_a_creation_that_the_runtime_refuses_leaves_nothing(node: Node) -> None:
    with pytest.raises(Exception, match="nothing-here"):
        await node.create("c1", "/nothing-here")
    await node.assert_clean()


async def test_a_container_outlives_containerd_and_its_status_is_found(node: Node) -> None:
    for name, status in (("c1", 42), ("c2", 7)):
        stream = "theseus-stream:"
        await node.create(
            name, "sh", "-c", f"cat; exit {status}", stdin=stream, stdout=stream, stderr=stream
        )
        await node.call("Start", name)
    await node.create("c3", "sleep", "1000")
    await node.call("Start", "c3")
    pid = (await node.call("Get", "c1")).process.pid
    await node.stop()
    os.kill(pid, signal.SIGKILL)
    await node.start()
    assert (await node.call("Wait", "c1")).exit_status == 137
    assert (await node.call("Get", "c2")).process.status == task_pb2.RUNNING
    async with node.client() as client:

        async def requests() -> AsyncIterator[streams_pb2.AttachRequest]:
            start = streams_pb2.AttachStart(container_id="c2", input=True, output=True)
            yield streams_pb2.AttachRequest(start=start)
            yield streams_pb2.AttachRequest(input=streams_pb2.Input(data=b"through\n"))
            yield streams_pb2.AttachRequest(close_input=streams_pb2.CloseInput())

        output = b""
        async for answer in client.streams.Attach(requests(), timeout=30):
            output += answer.output.data
    assert output == b"through\n"
    assert (await node.call("Wait", "c2")).exit_status == 7
    await node.call("Kill", "c3", signal=9)
    assert (await node.call("Wait", "c3")).exit_status == 137
    for name, status in (("c1", 137), ("c2", 7), ("c3", 137)):
        assert (await node.call("Delete", name)).exit_status == status
    assert (await node.topics()).count("/tasks/exit") == 3
    await node.assert_clean()


async def test_an_exec_in_a_real_container(node: Node) -> None:
    await node.create("c1", "sleep", "1000")
    await node.call("Start", "c1")
    process = {"user": {"uid": 0, "gid": 0}, "args": ["sh", "-c", "exit 5"], "cwd": "/"}
    spec = AnyMessage(
        type_url="types.containerd.io/opencontainers/runtime-spec/1/Process",
        value=json.dumps({**process, "env": ["PATH=/bin"]}).encode(),
    )
    await node.call("Exec", "c1", exec_id="e1", spec=spec)
    await node.call("Start", "c1", exec_id="e1")
    assert (await node.call("Wait", "c1", exec_id="e1")).exit_status == 5
    assert len((await node.call("ListPids", "c1")).processes) == 1


@pytest.mark.parametrize("running", [True, False])
async def test_a_dead_shim_is_buried_with_true_statuses(node: Node, running: bool) -> None:
    await node.create("c1", "sh", "-c", "sleep 1000" if running else "exit 9")
    await node.call("Start", "c1")
    init = (await node.call("Get", "c1")).process.pid
    expected = 137
    if not running:
        expected = 9
        await node.call("Wait", "c1")
    os.kill(node.shim_pid("c1"), signal.SIGKILL)
    told: Any = decode_event(await node.until_topic("/shims/gone"))
    assert [end.exit_status for end in told.processes] == [expected]
    assert (await node.call("Wait", "c1")).exit_status == expected
    assert not Path(f"/proc/{init}").exists()
    assert (await node.call("Delete", "c1")).exit_status == expected
    assert (await node.topics()).count("/tasks/exit") == 1
    await node.assert_clean()


async def test_a_frozen_container_is_buried_as_well(node: Node, runtime: str) -> None:
    await node.create("c1", "sleep", "1000", runtime=runtime)
    await node.call("Start", "c1")
    await node.call("Pause", "c1")
    os.kill(node.shim_pid("c1"), signal.SIGKILL)
    assert (await node.call("Wait", "c1")).exit_status == 137
    assert (await node.call("Delete", "c1")).exit_status == 137
    await node.assert_clean()


async def test_many_at_once(node: Node) -> None:
    async def life(number: int) -> int:
        name = f"m{number}"
        await node.create(name, "sh", "-c", f"exit {number}")
        await node.call("Start", name)
        await node.call("Wait", name)
        return int((await node.call("Delete", name)).exit_status)

    assert await asyncio.gather(*(life(number) for number in range(12))) == list(range(12))
    await node.assert_clean()
