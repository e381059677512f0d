"""The shims' metrics in one page, with one that hangs."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import pytest

from services.containerd.tasks.known import Standing
from tests.fakes.task_node import NS, TaskNode

if TYPE_CHECKING:
    from pathlib import Path

COUNT = 200
ROUNDS = 10  # other work on the machine may spoil some


def unanswered(node: TaskNode) -> float:
    name = "theseus_containerd_shim_scrapes_unanswered_total"
    return node.sample(name) or 0


async def test_many_shims_are_one_page_and_a_stuck_one_is_counted(tmp_path: Path) -> None:
    node = TaskNode(tmp_path)
    node.factory.registering = False
    await node.start(serve=False)
    try:
        turns = asyncio.Semaphore(16)

        async def begin(container_id: str) -> None:
            async with turns:
                known = await node.shims.begin(NS, container_id, b"{}")
                await node.shims.start(node.factory, known)
                known.turn(Standing.REACHABLE)

        await asyncio.gather(*(begin(f"c{index}") for index in range(COUNT)))
        await node.shims.scrape(timeout_s=5)  # connects every channel
        node.shim("c7").hanging.add("Metrics")
        for _ in range(ROUNDS):
            before = unanswered(node)
            began = time.perf_counter()
            page = await node.shims.scrape()
            took_s = time.perf_counter() - began
            assert took_s < 5.0
            assert page.count(b"fake_up{") == COUNT - unanswered(node) + before
            assert page.count(b"# TYPE fake_up gauge") == 1
            assert b'shim="c7"' not in page
            if took_s < 1.0 and unanswered(node) - before == 1:
                break
        else:
            pytest.fail(f"not one of {ROUNDS} rounds had all but the stuck shim within 1 s")
        known = node.sample("theseus_containerd_shims", {"standing": "reachable"})
        assert known == COUNT
    finally:
        await node.close()
