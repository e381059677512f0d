"""What containerd does about shims that died, and about those that are to be upgraded."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from protos.containerd.services.tasks.v1 import tasks_pb2 as pb
from protos.containerd.types.task import task_pb2
from services.common.errors import NotFound
from services.containerd.tasks.known import Standing
from services.containerd.tasks.line import ShimStartFailed
from services.containerd.tasks.upgrade import ShimUpgrades, Upgraded
from tests.fakes.task_node import NS, TaskNode

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

PROGRAM = ("/new/theseus-shim",)


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[TaskNode]:
    node = TaskNode(tmp_path)
    node.replacing = True
    await node.start()
    yield node
    await node.close()


async def get(node: TaskNode, container_id: str) -> task_pb2.Process:
    async with node.client() as client:
        request = pb.GetRequest(container_id=container_id)
        return (await client.tasks.Get(request, timeout=10)).process


async def wait(node: TaskNode, container_id: str) -> Any:
    async with node.client() as client:
        return await client.tasks.Wait(pb.WaitRequest(container_id=container_id), timeout=20)


async def settled(node: TaskNode, container_id: str, *standings: Standing) -> None:
    known = node.shims.get(NS, container_id)
    async with asyncio.timeout(10):
        while known.standing not in standings:
            await known.change()


async def upgrade(node: TaskNode, ids: Sequence[str], **options: Any) -> list[Upgraded]:
    upgrades = ShimUpgrades(node.shims, PROGRAM, **options)
    return [done async for done in upgrades.upgrade(NS, ids)]


def count(node: TaskNode, outcome: str) -> float | None:
    return node.sample("theseus_containerd_shims_settled_total", {"outcome": outcome})


async def test_dead_shim_is_replaced_and_waits_go_on(node: TaskNode) -> None:
    first = await node.running("c1")
    waiting = asyncio.create_task(wait(node, "c1"))
    await first.called("Wait")
    await first.die()
    await node.until_topic("/shims/replaced")
    second = node.shim("c1")
    assert second is not first
    assert second.instance_id == first.instance_id
    assert (await get(node, "c1")).status == task_pb2.RUNNING
    await second.called("Wait")
    await second.exit("", 6)
    assert (await waiting).exit_status == 6
    assert count(node, "replaced") == 1


async def test_shim_that_died_with_containerd_is_replaced_at_its_start(node: TaskNode) -> None:
    shim = await node.running("c1")
    await node.stop()
    await shim.die()
    await node.start()
    assert (await get(node, "c1")).status == task_pb2.RUNNING
    await settled(node, "c1", Standing.REGISTERED)
    await node.shim("c1").registered()


async def test_shim_without_a_successor_is_buried_with_the_reason(node: TaskNode) -> None:
    shim = await node.running("c1")
    node.factory.failure = ShimStartFailed("the bundle is on fire")
    await shim.die()
    await settled(node, "c1", Standing.GONE)
    assert (await get(node, "c1")).status in (task_pb2.STOPPED, task_pb2.UNKNOWN)
    assert "/shims/gone" in await node.topics()


async def test_shims_that_die_again_and_again_are_given_up(node: TaskNode) -> None:
    shim = await node.running("c1")
    for _ in range(5):
        await shim.die()
        async with asyncio.timeout(10):
            while node.shim("c1") is shim:
                await node.shims.get(NS, "c1").change(timeout_s=0.1)
        shim = node.shim("c1")
        await settled(node, "c1", Standing.REGISTERED)
    await shim.die()
    await settled(node, "c1", Standing.GONE)
    assert len(node.factory.started) == 6


async def test_shims_are_upgraded_in_place(node: TaskNode) -> None:
    shims = [await node.running(f"c{number}") for number in range(3)]
    waiting = asyncio.create_task(wait(node, "c1"))
    await shims[1].called("Wait")
    done = await upgrade(node, [])
    assert sorted(one.container_id for one in done) == ["c0", "c1", "c2"]
    for one in done:
        assert (one.version_before, one.version, one.generation, one.error) == ("v0", "v1", 1, "")
        assert one.downtime_us == 1500
    assert all(shim.programs == [list(PROGRAM)] for shim in shims)
    await shims[1].exit("", 3)
    assert (await waiting).exit_status == 3


async def test_upgrade_that_is_refused_says_why(node: TaskNode) -> None:
    shim = await node.running("c1")
    shim.refusal = "fails its self-check"
    [done] = await upgrade(node, ["c1"])
    assert (done.version_before, done.error) == ("v0", "fails its self-check")
    assert (await get(node, "c1")).status == task_pb2.RUNNING


async def test_upgrade_of_an_unknown_container_does_nothing(node: TaskNode) -> None:
    shim = await node.running("c1")
    with pytest.raises(NotFound, match="'c2'"):
        await upgrade(node, ["c1", "c2"])
    assert shim.programs == []


async def test_shim_that_does_not_come_back_is_killed_and_replaced(node: TaskNode) -> None:
    first = await node.running("c1")
    first.hanging.add("Reexec")
    [done] = await upgrade(node, ["c1"], limit_s=0.3)
    assert "was killed, and is replaced" in done.error
    await node.until_topic("/shims/replaced")
    assert node.shim("c1") is not first
    assert (await get(node, "c1")).status == task_pb2.RUNNING
