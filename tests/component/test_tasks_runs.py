"""Record, task and start of a container by one call."""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc
import pytest
from google.protobuf import any_pb2

from protos.containerd.services.containers.v1 import containers_pb2
from protos.containerd.services.tasks.v1 import tasks_pb2
from protos.containerd.types import descriptor_pb2
from protos.theseus.tasks.v1 import runs_pb2 as pb
from services.common.rpc_errors import from_rpc_error
from tests.fakes.task_node import NS, TaskClient, TaskNode

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[TaskNode]:
    node = TaskNode(tmp_path)
    await node.start()
    yield node
    await node.close()


@pytest.fixture
async def client(node: TaskNode) -> AsyncIterator[TaskClient]:
    async with node.client() as client:
        yield client


def request(image: str = "", **task: object) -> pb.RunRequest:
    runtime = containers_pb2.Container.Runtime(name="io.containerd.runc.v2")
    spec = any_pb2.Any(type_url="spec", value=b"{}")
    return pb.RunRequest(
        container=containers_pb2.Container(id="c1", runtime=runtime, spec=spec, image=image),
        task=tasks_pb2.CreateTaskRequest(container_id="c1", **task),  # type: ignore[arg-type]
    )


async def test_a_run_records_makes_and_starts(node: TaskNode, client: TaskClient) -> None:
    pid = (await client.runs.Run(request("one"), timeout=10)).pid
    shim = node.shim("c1")
    assert pid == shim.processes[""].pid
    assert shim.processes[""].status == "running"
    assert (await node.metadata.containers.get(NS, "c1")).image == "one"


async def test_a_run_whose_answer_was_lost_is_made_once(node: TaskNode, client: TaskClient) -> None:
    pid = (await client.runs.Run(request(), timeout=10)).pid
    assert (await client.runs.Run(request(), timeout=10)).pid == pid
    assert node.shim("c1").calls.count("Start") == 1


async def test_a_task_that_was_only_created_is_started(node: TaskNode, client: TaskClient) -> None:
    await node.container("c1")
    created = tasks_pb2.CreateTaskRequest(container_id="c1")
    pid = (await client.tasks.Create(created, timeout=10)).pid
    assert (await client.runs.Run(request(), timeout=10)).pid == pid
    assert node.shim("c1").processes[""].status == "running"


async def test_a_record_of_an_earlier_run_is_replaced(node: TaskNode, client: TaskClient) -> None:
    await node.container("c1")
    await client.runs.Run(request("newer"), timeout=10)
    assert (await node.metadata.containers.get(NS, "c1")).image == "newer"


async def test_a_task_that_cannot_be_started_stands(node: TaskNode, client: TaskClient) -> None:
    node.factory.prepare.append(("faults", {"Start": grpc.StatusCode.FAILED_PRECONDITION}))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.runs.Run(request(), timeout=10)
    assert "Start fails on demand" in from_rpc_error(caught.value).message
    assert node.shim("c1").processes[""].status == "created"


async def test_a_checkpoint_is_refused(node: TaskNode, client: TaskClient) -> None:
    checkpoint = descriptor_pb2.Descriptor(digest="sha256:" + "0" * 64)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.runs.Run(request(checkpoint=checkpoint), timeout=10)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert await node.metadata.containers.find(NS, []) == []
