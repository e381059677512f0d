"""One process is the shim of several containers, one after the other, whoever dies in between."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import TYPE_CHECKING

import pytest

from services.common.errors import Unavailable
from services.containerd.tasks.processes import ProcessHandle, ProcessId
from tests.fakes.eventually import eventually
from tests.fakes.task_node import NS
from tests.integration.real_task_node import RealTaskNode as Node

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from services.containerd.tasks.known import KnownShim

pytestmark = pytest.mark.root

TOPICS = ["/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"]


@pytest.fixture(params=[False])
async def node(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Node]:
    node = Node(tmp_path, replacing=request.param)
    await node.start()
    await ready(node)
    yield node
    await node.close()


async def ready(node: Node) -> None:
    await eventually(lambda: len(node.launcher.waiting) == 1)


def free(node: Node) -> list[int]:
    """Pids of the processes that wait."""
    return [line.process.pid for line in node.launcher.waiting._ready]


async def start(node: Node, container_id: str, script: str) -> ProcessId:
    """Run a container; returns its shim's process."""
    await node.create(container_id, "sh", "-c", script)
    await node.call("Start", container_id)
    process = node.shims.get(NS, container_id).process
    assert process is not None
    assert node.bundles.find(NS, container_id).process() == process
    return process


async def finish(node: Node, container_id: str, status: int) -> None:
    assert (await node.call("Wait", container_id)).exit_status == status
    assert (await node.call("Delete", container_id)).exit_status == status


async def one(node: Node, container_id: str, status: int) -> ProcessId:
    """A container's whole life, until its shim is free or gone."""
    process = await start(node, container_id, f"exit {status}")
    await finish(node, container_id, status)
    await node.shims_removed()
    return process


async def ended(process: ProcessId) -> None:
    handle = ProcessHandle.open(process)
    if handle is not None:
        with handle:
            async with asyncio.timeout(10):
                await handle.ended()


async def test_containers_one_after_the_other_have_one_shim(node: Node) -> None:
    processes = set()
    for number in range(4):
        processes.add(await one(node, f"c{number}", number))
        await eventually(lambda: len(node.launcher.waiting) >= 1)
    assert len(processes) == 1
    assert await node.topics() == 4 * TOPICS
    await node.assert_clean()


async def test_a_name_that_comes_again_finds_nothing_of_the_first(node: Node) -> None:
    process = await one(node, "c1", 1)
    await node.metadata.containers.delete(NS, "c1")
    await eventually(lambda: process.pid in free(node))
    assert await one(node, "c1", 9) == process
    await node.assert_clean()


async def test_one_that_is_killed_while_it_is_free_is_not_missed(node: Node) -> None:
    process = await one(node, "c1", 3)
    await eventually(lambda: process.pid in free(node))
    os.kill(process.pid, signal.SIGKILL)
    assert await one(node, "c2", 4) != process
    assert await node.topics() == 2 * TOPICS
    await node.assert_clean()


async def test_one_that_is_free_ends_with_containerd(node: Node) -> None:
    process = await one(node, "c1", 3)
    await eventually(lambda: process.pid in free(node))
    await eventually(lambda: process.pid in free(node))
    running = await start(node, "c2", "sleep 1000")
    assert running == process
    await eventually(lambda: len(node.launcher.waiting) >= 1)
    waiting = [line.process for line in node.launcher.waiting._ready]
    await node.stop()
    for process in waiting:
        await ended(process)
    await node.start()
    await node.call("Kill", "c2", signal=9)
    await finish(node, "c2", 137)
    await ended(running)  # nobody would take it: its line ended with the first containerd
    await node.assert_clean()


async def test_a_containerd_that_dies_before_a_free_one_is_forgotten_takes_it_for_no_other(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = await start(node, "c1", "exit 3")
    reached = asyncio.Event()

    async def stop_here(known: KnownShim) -> None:
        reached.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(node.shims._undertaker, "drain", stop_here)
    await finish(node, "c1", 3)
    async with asyncio.timeout(10):
        await reached.wait()
    assert process.alive()
    assert process.pid not in free(node)  # it waits, and nobody can ask it
    assert node.bundles.find(NS, "c1").process() == process
    other = await start(node, "c2", "sleep 1000")
    assert other != process
    await node.stop()
    await ended(process)
    await node.start()
    await eventually(lambda: (NS, "c1") not in node.shims._shims)
    assert other.alive()
    await node.call("Kill", "c2", signal=9)
    await finish(node, "c2", 137)
    await node.assert_clean()


@pytest.mark.parametrize("node", [True], indirect=True)
async def test_one_that_dies_over_its_second_container_has_a_successor_for_that(node: Node) -> None:
    process = await one(node, "c1", 3)
    await eventually(lambda: process.pid in free(node))
    assert await start(node, "c2", "cat /tmp/none; sleep 1000") == process
    os.kill(process.pid, signal.SIGKILL)
    await node.until_topic("/shims/replaced")
    assert node.shims.get(NS, "c2").process != process
    await node.call("Kill", "c2", signal=15)
    await node.call("Kill", "c2", signal=9)
    await finish(node, "c2", 137)
    topics = await node.topics()
    assert [topic for topic in topics if topic.startswith("/shims/")] == ["/shims/replaced"]
    await node.assert_clean()


async def test_one_that_executes_another_version_is_not_used_again(node: Node) -> None:
    process = await one(node, "c1", 3)
    await eventually(lambda: process.pid in free(node))
    assert await start(node, "c2", "sleep 1000") == process
    shim = node.shims.get(NS, "c2").shim
    assert shim is not None
    while True:
        try:
            done = await shim.reexec((), 1)
            break
        except Unavailable:  # it breaks once, and is asked again
            continue
    assert done.generation == 1
    assert process.alive()
    await node.call("Kill", "c2", signal=9)
    await finish(node, "c2", 137)
    await ended(process)
    await node.assert_clean()


async def test_many_at_once_need_few_processes(node: Node) -> None:
    async def client(name: str) -> list[ProcessId]:
        found = []
        for number in range(4):
            found.append(await start(node, f"{name}-{number}", f"exit {number}"))
            await finish(node, f"{name}-{number}", number)
        return found

    lives = [p for found in await asyncio.gather(*map(client, "abcd")) for p in found]
    await node.shims_removed()
    assert len(set(lives)) < len(lives)
    await eventually(lambda: len(node.launcher.waiting) == 1)
    alive = [process for process in set(lives) if process.alive()]
    await eventually(lambda: sum(process.alive() for process in alive) <= 1)
    await node.assert_clean()
