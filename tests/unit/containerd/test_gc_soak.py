"""Pulls, containers and removals, all at once, while garbage is collected without a pause.

A few dozen rounds; 10,000 with THESEUS_SOAK=1 in the environment.
"""

from __future__ import annotations

import asyncio
import os
import random
from typing import TYPE_CHECKING

import pytest

from services.common.errors import NotFound
from services.containerd.content.digest import chain_ids
from tests.fakes.images import Blobs, BuiltImage, build_image
from tests.fakes.registry import FakeRegistry
from tests.fakes.storage_node import NS, StorageNode, open_storage

if TYPE_CHECKING:
    from pathlib import Path

SOAK = os.environ.get("THESEUS_SOAK") == "1"
WORKERS = 8
ROUNDS = 10_000 if SOAK else 80


class Worker:
    """Pulls images under names of its own, whose blobs and layers others pull and remove, too."""

    def __init__(self, node: StorageNode, number: int, images: dict[str, BuiltImage]) -> None:
        self.node = node
        self.number = number
        self.images = images
        self.random = random.Random(number)

    async def work(self, rounds: int) -> None:
        for number in range(rounds):
            await self.round(number)
        for name in self.images:  # takes along what broken-off pulls have left
            await self.node.pull(name)
            await self.node.images.delete(NS, name)

    async def round(self, number: int) -> None:
        name, image = self.random.choice(list(self.images.items()))
        snapshotter = self.random.choice(["overlayfs", "overlayfs", "native"])
        if self.random.random() < 0.1:
            await self.break_off(name, snapshotter)
            return
        await self.node.pull(name, snapshotter)
        await self.all_is_there(image, snapshotter)
        key = f"box-{self.number}-{number}"
        await self.node.run(key, chain_ids(image.diff_ids)[-1], snapshotter)
        if self.random.random() < 0.5:
            # The container keeps its snapshots without the image.
            await self.node.images.delete(NS, name, sync=self.random.random() < 0.2)
            await self.snapshots_are_there(key, snapshotter)
            await self.node.remove(key, snapshotter)
        else:
            await self.all_is_there(image, snapshotter)
            await self.snapshots_are_there(key, snapshotter)
            await self.node.remove(key, snapshotter)
            await self.node.images.delete(NS, name)

    async def break_off(self, name: str, snapshotter: str) -> None:
        pull = asyncio.ensure_future(self.node.pull(name, snapshotter))
        await asyncio.wait([pull], timeout=self.random.random() * 0.05)
        pull.cancel()
        await asyncio.wait([pull])
        if not pull.cancelled():
            pull.result()
            await self.node.images.delete(NS, name)

    async def all_is_there(self, image: BuiltImage, snapshotter: str) -> None:
        for blob in (image.manifest, image.config, *image.layers):
            data = await self.node.content.read(NS, blob.digest, max_bytes=1 << 20)
            assert len(data) == blob.size_bytes
        for name in chain_ids(image.diff_ids):
            await self.node.snapshotters[snapshotter].stat(NS, name)

    async def snapshots_are_there(self, key: str, snapshotter: str) -> None:
        [mount] = await self.node.snapshotters[snapshotter].mounts(NS, key)
        places = [mount.source] if mount.type == "bind" else []
        for option in mount.options:
            option_name, _, value = option.partition("=")
            if option_name in ("lowerdir", "upperdir", "workdir"):
                places += value.split(":")
        assert places and all(map(os.path.isdir, places))


@pytest.mark.timeout(3600 if SOAK else 60)
async def test_nothing_in_use_is_collected_and_nothing_else_is_left(tmp_path: Path) -> None:
    async with FakeRegistry() as registry, open_storage(tmp_path / "root") as node:
        built = []
        for number in range(3):
            blobs = Blobs()
            layers = [{"base": b"1"}, {"shared": b"2"}, {"own": b"%d" % number}][number % 2 :]
            built.append((blobs, build_image(blobs, layers)))
        workers = [
            Worker(
                node,
                number,
                {
                    registry.serve(f"library/x{index}", f"w{number}", image.manifest, blobs): image
                    for index, (blobs, image) in enumerate(built)
                },
            )
            for number in range(WORKERS)
        ]
        collections = 0

        async def collect() -> None:
            nonlocal collections
            while True:
                await node.collector.collect()
                collections += 1
                await asyncio.sleep(0.002)

        collecting = asyncio.ensure_future(collect())
        try:
            async with asyncio.TaskGroup() as group:
                for worker in workers:
                    group.create_task(worker.work(ROUNDS // WORKERS))
        finally:
            collecting.cancel()
            await asyncio.wait([collecting])
        await node.collector.collect()
        assert await node.is_empty()
        assert collections > ROUNDS / 20
        with pytest.raises(NotFound):
            await node.content.info(NS, built[0][1].manifest.digest)
