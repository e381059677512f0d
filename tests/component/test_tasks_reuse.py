"""A process that waits again after its container: whose it is, and when it can be another's."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from protos.containerd.services.tasks.v1 import tasks_pb2 as pb
from services.common.errors import Internal
from tests.fakes.task_node import NS, TaskNode

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from services.containerd.tasks.known import KnownShim
    from tests.fakes.shim import FakeShim


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[TaskNode]:
    node = TaskNode(tmp_path)
    await node.start()
    yield node
    await node.close()


class Line:
    """The line to a shim, which waits again when it is told to go."""

    way = None

    def __init__(self, node: TaskNode, shim: FakeShim) -> None:
        self._node = node
        self.known = node.shims.get(NS, shim.id)
        self._shim = shim
        self.found: dict[str, Any] | None = None
        self.closed = False
        self.done = asyncio.Event()

    async def waits_again(self) -> bool:
        await self._shim.called("Shutdown")
        return True

    def release(self) -> None:
        self.found = {
            "bundle": self.known.bundle.exists(),
            "known": list(self._node.shims._shims),
            "process": self.known.process,
            "alive": self._shim.alive,
        }
        self.done.set()

    def close(self) -> None:
        self.closed = True
        self.done.set()


async def with_line(node: TaskNode, container_id: str) -> tuple[FakeShim, Line]:
    """A container whose shim does not end when it is told to go."""
    shim = await node.running(container_id)
    shim.hanging.add("Shutdown")
    line: Any = Line(node, shim)
    line.known.line = line
    return shim, line


async def delete(node: TaskNode, container_id: str) -> None:
    async with node.client() as client:
        await client.tasks.Delete(pb.DeleteTaskRequest(container_id=container_id), timeout=10)


async def until(line: Line) -> None:
    async with asyncio.timeout(10):
        await line.done.wait()


async def test_it_is_given_back_when_nothing_names_it_any_more(node: TaskNode) -> None:
    shim, line = await with_line(node, "c1")
    watch = line.known.watch
    await shim.exit("", 3)
    await delete(node, "c1")
    await until(line)
    assert line.found == {"bundle": False, "known": [], "process": None, "alive": True}
    assert not line.closed
    assert watch is not None
    await asyncio.wait([watch], timeout=10)
    assert watch.cancelled()
    await shim.die()  # with another container, by now: that is none of the first one's business
    topics = await node.topics()
    assert topics.count("/tasks/exit") == topics.count("/tasks/delete") == 1
    assert not [topic for topic in topics if topic.startswith("/shims/")]


async def test_a_new_task_of_the_same_id_has_to_wait_for_that(node: TaskNode) -> None:
    shim, line = await with_line(node, "c1")
    await shim.exit("", 3)
    await delete(node, "c1")
    async with node.client() as client:
        await client.tasks.Create(pb.CreateTaskRequest(container_id="c1"), timeout=10)
    assert line.found is not None
    assert not line.found["bundle"]
    assert node.shim("c1") is not shim
    assert node.shims.get(NS, "c1").process != line.known.process


async def test_it_is_not_given_back_when_its_record_stays(
    node: TaskNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    shim, line = await with_line(node, "c1")

    async def fail(known: KnownShim, **_options: bool) -> None:
        raise Internal("the bundle cannot be removed")

    monkeypatch.setattr(node.shims._undertaker, "remove", fail)
    await shim.exit("", 3)
    await delete(node, "c1")
    await until(line)
    assert line.closed
    assert line.found is None
    assert line.known.bundle.deletion() is not None


async def test_one_that_does_not_say_that_it_waits_is_killed(
    node: TaskNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.containerd.tasks.undertaker._GO_S", 0.1)
    shim, line = await with_line(node, "c1")

    async def never() -> bool:
        await asyncio.Event().wait()
        return True

    monkeypatch.setattr(line, "waits_again", never)
    await shim.exit("", 3)
    await delete(node, "c1")
    await until(line)
    assert line.found is not None
    assert not line.found["alive"]
