"""One shim for several containers, with real runtimes: those of a pod, or so many to a shim."""

from __future__ import annotations

import asyncio
import json
import os
import select
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from protos.containerd.types.task import task_pb2
from services.common.errors import FailedPrecondition, NotFound
from services.containerd.tasks.known import Standing
from services.containerd.tasks.upgrade import ShimUpgrades
from tests.fakes.eventually import eventually
from tests.fakes.task_node import NS
from tests.integration.real_task_node import RealTaskNode

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = pytest.mark.root

POD = {"io.kubernetes.cri.sandbox-id": "pod"}
TICK = "n=0; while [ ! -e /stop-{id} ]; do n=$((n+1)); echo $n; sleep 0.02; done; exit {code}"
PROGRAM = (sys.executable, "-m", "services.shim")


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[RealTaskNode]:
    node = RealTaskNode(tmp_path, replacing=True)
    await node.start()
    yield node
    await node.close()


async def start_pod(
    node: RealTaskNode, runtime: str, count: int, annotations: dict[str, str] | None = None
) -> list[str]:
    """Containers that count into logs of their own, and end with 11, 12 and so on."""
    names = [f"c{number}" for number in range(count)]
    for number, name in enumerate(names):
        out = f"theseus-log://{node.root}/{name}.log"
        await node.create(
            name,
            "sh",
            "-c",
            TICK.format(id=name, code=11 + number),
            runtime=runtime,
            annotations=POD if annotations is None else annotations,
            stdout=out,
            stderr=out,
        )
        await node.call("Start", name)
    return names


def pids(node: RealTaskNode, names: list[str]) -> set[int]:
    return {node.shim_pid(name) for name in names}


def numbers(node: RealTaskNode, name: str) -> list[int]:
    path = node.root / f"{name}.log"
    lines = path.read_text().splitlines() if path.exists() else []
    return [int(json.loads(line)["log"]) for line in lines]


async def grows(node: RealTaskNode, name: str) -> None:
    before = len(numbers(node, name))
    await eventually(lambda: len(numbers(node, name)) > before + 2)


async def finish(node: RealTaskNode, name: str, code: int) -> None:
    (node.rootfs / f"stop-{name}").touch()
    assert (await node.call("Wait", name)).exit_status == code
    assert (await node.call("Delete", name)).exit_status == code


async def gone(pid: int) -> None:
    """Return once a process has ended."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        await asyncio.to_thread(select.select, [fd], [], [], 10)
        assert select.select([fd], [], [], 0)[0]
    finally:
        os.close(fd)


async def test_a_pod_has_one_shim_which_ends_with_the_last(
    node: RealTaskNode, runtime: str
) -> None:
    names = await start_pod(node, runtime, 3)
    await node.create("alone", "sleep", "1000", runtime=runtime)
    (shim,) = pids(node, names)
    assert node.shim_pid("alone") != shim
    page = (await node.shims.scrape()).decode()
    assert f'theseus_shim_containers{{namespace="{NS}",shim="c0"}} 3' in page
    assert 'shim="c1"' not in page
    for name in names:
        await grows(node, name)
    # The first one's bundle was the process' home: the others do not need it.
    await finish(node, "c0", 11)
    await eventually(lambda: not node.bundles.find(NS, "c0").exists())
    with pytest.raises(NotFound):
        await node.call("Get", "c0")
    await grows(node, "c1")
    log = node.bundles.find(NS, "c1").path / "shim.log"
    assert Path(f"/proc/{shim}/fd/2").readlink() == log
    # Its name is free, and a new container of that name joins again.
    await node.metadata.containers.delete(NS, "c0")
    await node.create("c0", "sh", "-c", "exit 5", runtime=runtime, annotations=POD)
    await node.call("Start", "c0")
    assert node.shim_pid("c0") == shim
    assert (await node.call("Wait", "c0")).exit_status == 5
    await asyncio.gather(node.call("Delete", "c0"), finish(node, "c1", 12), finish(node, "c2", 13))
    await gone(shim)
    await node.call("Delete", "alone")
    await node.assert_clean()
    topics = await node.topics()
    assert topics.count("/tasks/exit") == topics.count("/tasks/delete") == 5
    assert not [topic for topic in topics if topic.startswith("/shims/")]


async def test_a_pod_outlives_containerd(node: RealTaskNode, runtime: str) -> None:
    names = await start_pod(node, runtime, 2)
    (shim,) = pids(node, names)
    await node.stop()
    (node.rootfs / "stop-c0").touch()
    await node.start()
    assert (await node.call("Wait", "c0")).exit_status == 11
    await eventually(
        lambda: {known.standing for known in node.shims.all(NS)} == {Standing.REGISTERED}
    )
    out = f"theseus-log://{node.root}/late.log"
    await node.create("late", "echo", "hi", annotations=POD, runtime=runtime, stdout=out)
    await node.call("Start", "late")
    assert node.shim_pid("late") == shim
    assert (await node.call("Wait", "late")).exit_status == 0
    for name in ("late", "c0"):
        await node.call("Delete", name)
    await finish(node, "c1", 12)
    await gone(shim)
    await node.assert_clean()


async def test_a_dead_shim_of_a_pod_has_one_successor_for_all(
    node: RealTaskNode, runtime: str
) -> None:
    names = await start_pod(node, runtime, 3)
    (shim,) = pids(node, names)
    for name in names:
        await grows(node, name)
    os.kill(shim, signal.SIGKILL)
    await eventually(lambda: pids(node, names).isdisjoint({shim}), limit_s=20)
    (successor,) = pids(node, names)
    for number, name in enumerate(names):
        await grows(node, name)
        assert (await node.call("Get", name)).process.status == task_pb2.RUNNING
        await finish(node, name, 11 + number)
    await gone(successor)
    await node.assert_clean()
    topics = await node.topics()
    assert topics.count("/tasks/exit") == topics.count("/shims/replaced") == 3
    for name in names:
        seen = numbers(node, name)
        assert seen == sorted(set(seen))


async def test_a_pods_shim_is_executed_anew_once_for_all(node: RealTaskNode, runtime: str) -> None:
    names = await start_pod(node, runtime, 3)
    (shim,) = pids(node, names)
    waiting = [asyncio.ensure_future(node.call("Wait", name)) for name in names]
    await finish(node, "c1", 12)
    upgrades = ShimUpgrades(node.shims, PROGRAM)
    done = [upgraded async for upgraded in upgrades.upgrade(NS, [])]
    assert sorted((one.container_id, one.generation, one.error) for one in done) == [
        ("c0", 1, ""),
        ("c2", 1, ""),
    ]
    assert pids(node, ["c0", "c2"]) == {shim}
    await grows(node, "c0")
    await node.create("more", "sleep", "1000", annotations=POD, runtime=runtime)
    assert node.shim_pid("more") == shim
    await node.call("Delete", "more")
    await finish(node, "c0", 11)
    await finish(node, "c2", 13)
    assert [(await wait).exit_status for wait in waiting] == [11, 12, 13]
    for name in ("c0", "c2"):
        seen = numbers(node, name)
        assert seen == list(range(1, len(seen) + 1))
    await gone(shim)
    await node.assert_clean()


async def test_so_many_containers_to_a_shim_by_configuration(tmp_path: Path) -> None:
    node = RealTaskNode(tmp_path, containers_per_shim=2)
    await node.start()
    try:
        await asyncio.gather(*(node.create(f"c{n}", "sleep", "1000") for n in range(5)))
        shims = [node.shim_pid(f"c{n}") for n in range(5)]
        assert sorted(shims.count(pid) for pid in set(shims)) == [1, 2, 2]
        with pytest.raises(FailedPrecondition):
            await node.call("Start", "c0")
            await node.call("Start", "c0")
    finally:
        await node.close()
    await node.assert_clean()


async def test_a_creation_that_fails_leaves_the_others_alone(node: RealTaskNode) -> None:
    names = await start_pod(node, "runc", 1)
    with pytest.raises(Exception, match="nothing-here"):
        await node.create("bad", "/nothing-here", annotations=POD)
    assert not node.bundles.find(NS, "bad").exists()
    await grows(node, "c0")
    shim = node.shim_pid("c0")
    await finish(node, *names, 11)
    await gone(shim)
    await node.assert_clean()
