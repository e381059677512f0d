"""Tasks with the real factory, shims and runtimes: restarts, dead shims, nothing left behind."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from google.protobuf.any_pb2 import Any as AnyMessage

from protos.containerd.types.task import task_pb2
from protos.theseus.shim.v1 import streams_pb2
from services.common.mounts import Mount
from services.containerd.rpc.encoding import decode_event
from tests.integration.real_task_node import RealTaskNode as Node

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = pytest.mark.root


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


@pytest.fixture
async def open_node() -> AsyncIterator[Node]:
    """A node that others than root get through to, as they do below /var/lib."""
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        Path(directory).chmod(0o711)
        node = Node(Path(directory))
        await node.start()
        yield node
        await node.close()


async def test_a_user_namespace_finds_the_layers_its_own(open_node: Node) -> None:
    """The shim mounts them so, as the snapshotter says; nobody else sees them changed."""
    node = open_node
    for name in ("upper", "work"):
        (node.root / name).mkdir()
    os.chown(node.root / "upper", 100000, 100000)
    layers = (
        *("uidmap=0:100000:65536", "gidmap=0:100000:65536"),
        *(f"workdir={node.root}/work", f"upperdir={node.root}/upper"),
        *(f"lowerdir={node.rootfs}", "index=off"),
    )
    out = f"file://{node.root}/out"
    script = "busybox id -u; busybox stat -c %u:%g /bin/busybox; echo x > /bin/new"
    await node.create(
        *("c1", "sh", "-c", script),
        rootfs=[Mount("overlay", "overlay", options=layers)],
        mapped_to=100000,
        stdout=out,
        stderr=out,
    )
    await node.call("Start", "c1")
    status = (await node.call("Wait", "c1")).exit_status
    assert ((node.root / "out").read_text(), status) == ("0\n0:0\n", 0)
    await node.call("Delete", "c1")
    assert (node.root / "upper/bin/new").stat().st_uid == 100000
    assert (node.rootfs / "bin/busybox").stat().st_uid == 0
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


async def test_a_runtime_that_a_dead_shim_did_not_see_delete_is_told_again(
    node: Node, runtime: str
) -> None:
    slow = node.root / "slow"  # a delete that comes to nothing, as if it were killed with the shim
    slow.write_text(
        "#!/bin/sh\n"
        'case " $* " in *" --force "*) ;; *" delete "*) exec sleep 0.3 ;; esac\n'
        f'exec {shutil.which(runtime)} "$@"\n'
    )
    slow.chmod(0o755)
    await node.create("c1", "sh", "-c", "exit 9", runtime=str(slow))
    await node.call("Start", "c1")
    await node.call("Wait", "c1")
    shim = node.shim_pid("c1")
    assert (await node.call("Delete", "c1")).exit_status == 9
    os.kill(shim, signal.SIGKILL)
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
