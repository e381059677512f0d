"""Containerd killed at each step of what it does with files and rows, started again, checked.

Each life is a process of its own, which kills itself at the step: nothing is undone or closed.
"""

from __future__ import annotations

import asyncio
import os
import signal
import traceback
from typing import TYPE_CHECKING

import pytest

from services.containerd.content.digest import chain_ids
from tests.fakes.images import Blobs, build_image
from tests.fakes.registry import FakeRegistry
from tests.fakes.storage_node import NS, nothing, open_checker, open_storage

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from services.containerd.check.findings import Finding

STEPS = {
    "ingest": ["ingest opened", "renamed", "recorded", "ingest dropped"],
    "prepare": ["directory made", "prepared"],
    "unpack": ["layer prepared", "layer applied"],
    "commit": ["synced", "committed", "layer committed"],
    "remove": ["row deleted", "put aside"],
    "collect": ["swept", "released", "blobs collected", "ingests collected"],
}


async def life(root: Path, trace: Callable[[str], None]) -> None:
    """Everything once, from nothing to nothing."""
    blobs = Blobs()
    image = build_image(blobs, [{"one": b"1" * 5000}, {"two": b"2"}])
    top = chain_ids(image.diff_ids)[-1]
    armed = asyncio.Event()

    def traced(step: str) -> None:
        if armed.is_set():
            trace(step)

    async with FakeRegistry() as registry, open_storage(root, trace=traced) as node:
        name = registry.serve("library/x", "1", image.manifest, blobs)
        for container in await node.containers.find(NS):  # of a life before
            await node.remove(container.id, container.snapshotter)
        await node.collector.collect()
        armed.set()
        async with await node.content.writer(NS, "thrown away") as writer:
            await writer.write(b"x")
        await node.content.abort(NS, "thrown away")
        for snapshotter in ("overlayfs", "native"):
            await node.pull(name, snapshotter)
            await node.run(f"box-{snapshotter}", top, snapshotter)
        for blob in (image.manifest, image.config, *image.layers):
            assert await node.content.read(NS, blob.digest) == blobs.data[blob.digest]
        for snapshotter in ("overlayfs", "native"):
            await node.remove(f"box-{snapshotter}", snapshotter)
        async with await node.content.writer(NS, "left behind") as writer:
            await writer.write(b"x")
        await node.images.delete(NS, name)
        await node.collector.collect()


def in_a_process(root: Path, trace: Callable[[str], None]) -> int:
    """Live in a child; returns how it ended, as wait(2) gives it."""
    child = os.fork()
    if child == 0:
        try:
            asyncio.run(life(root, trace))
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]


async def check(root: Path) -> list[Finding]:
    """What an offline check finds: by names and sizes, then by all bytes."""
    async with open_checker(root) as checker:
        return [*await checker.quick(), *await checker.full(repair=False)]


@pytest.mark.parametrize("step", [step for steps in STEPS.values() for step in steps])
def test_a_kill_leaves_what_can_be_gone_on_with(tmp_path: Path, step: str) -> None:
    def kill(reached: str) -> None:
        if reached == step:
            os.kill(os.getpid(), signal.SIGKILL)

    status = in_a_process(tmp_path, kill)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL

    async def go_on() -> None:
        assert [finding for finding in await check(tmp_path) if finding.remains] == []
        await life(tmp_path, nothing)
        async with open_storage(tmp_path) as node:
            # What the dead process still keeps is kept for a day; a day passes.
            for image in await node.images.find(NS):
                await node.images.delete(NS, image.name)
            for container in await node.containers.find(NS):
                await node.containers.delete(NS, container.id)
            for lease in await node.leases.find(NS):
                await node.leases.delete(NS, lease.id)
            await node.db.write(lambda tx: tx.execute("UPDATE ingests SET updated_at_ns = 0"))
            await node.collector.collect()
            assert await node.is_empty()
        assert await check(tmp_path) == []

    asyncio.run(go_on())


def test_those_are_all_the_steps(tmp_path: Path) -> None:
    record = tmp_path / "steps"

    def note(reached: str) -> None:
        with record.open("a") as file:
            file.write(f"{reached}\n")

    assert in_a_process(tmp_path / "root", note) == 0
    assert set(record.read_text().splitlines()) == {s for steps in STEPS.values() for s in steps}
