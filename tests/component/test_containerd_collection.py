"""When a whole containerd collects: what nobody asked for, what somebody did, and after a kill."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from google.protobuf import any_pb2

from protos.containerd.services.containers.v1 import containers_pb2, containers_pb2_grpc
from protos.containerd.services.images.v1 import images_pb2, images_pb2_grpc
from protos.containerd.services.leases.v1 import leases_pb2, leases_pb2_grpc
from protos.containerd.services.snapshots.v1 import snapshots_pb2, snapshots_pb2_grpc
from protos.containerd.types import descriptor_pb2
from protos.theseus.journal.v1 import journal_pb2, journal_pb2_grpc
from services.common.client import connect
from services.containerd.gc.policy import GcPolicy
from tests.fakes.containerd import ContainerdProcess, node_directory, running_app

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    import grpc

T = 20.0
OVERLAY = "overlayfs"
LONG = "--gc-pause-threshold=0.00001"
"""Intervals of 500 seconds between scheduled collections."""

pytestmark = pytest.mark.root


@pytest.fixture
async def directory() -> AsyncIterator[Path]:
    async with node_directory() as made:
        yield made


class Client:
    """What the tests do through containerd's API. Snapshots are made under no lease."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._snapshots = snapshots_pb2_grpc.SnapshotsStub(channel)
        self._containers = containers_pb2_grpc.ContainersStub(channel)
        self._leases = leases_pb2_grpc.LeasesStub(channel)
        self._images = images_pb2_grpc.ImagesStub(channel)
        self._journal = journal_pb2_grpc.JournalStub(channel)

    async def prepare(self, key: str, parent: str = "", **labels: str) -> None:
        request = snapshots_pb2.PrepareSnapshotRequest(
            snapshotter=OVERLAY, key=key, parent=parent, labels=labels
        )
        await self._snapshots.Prepare(request, timeout=T)

    async def commit(self, key: str, name: str) -> None:
        request = snapshots_pb2.CommitSnapshotRequest(snapshotter=OVERLAY, key=key, name=name)
        await self._snapshots.Commit(request, timeout=T)

    async def remove(self, key: str) -> None:
        request = snapshots_pb2.RemoveSnapshotRequest(snapshotter=OVERLAY, key=key)
        await self._snapshots.Remove(request, timeout=T)

    async def delete_a_container(self) -> None:
        container = containers_pb2.Container(
            id="c",
            runtime=containers_pb2.Container.Runtime(name="io.containerd.runc.v2"),
            spec=any_pb2.Any(type_url="spec", value=b"{}"),
        )
        await self._containers.Create(
            containers_pb2.CreateContainerRequest(container=container), timeout=T
        )
        await self._containers.Delete(containers_pb2.DeleteContainerRequest(id="c"), timeout=T)

    async def delete_a_lease(self, *, sync: bool) -> None:
        await self._leases.Create(leases_pb2.CreateRequest(id="l"), timeout=T)
        await self._leases.Delete(leases_pb2.DeleteRequest(id="l", sync=sync), timeout=T)

    async def delete_an_image(self, *, sync: bool) -> None:
        target = descriptor_pb2.Descriptor(media_type="t", digest=f"sha256:{'a' * 64}", size=1)
        image = images_pb2.Image(name="i", target=target)
        await self._images.Create(images_pb2.CreateImageRequest(image=image), timeout=T)
        await self._images.Delete(images_pb2.DeleteImageRequest(name="i", sync=sync), timeout=T)

    async def snapshots(self) -> set[str]:
        request = snapshots_pb2.ListSnapshotsRequest(snapshotter=OVERLAY)
        answers = [answer async for answer in self._snapshots.List(request, timeout=T)]
        return {info.name for answer in answers for info in answer.info}

    async def removed(self, number: int = 1) -> str:
        """The snapshot that was removed as the Nth in all of the node's life."""
        request = journal_pb2.ReadRequest(topics=["/snapshot/remove"])
        async with asyncio.timeout(T):
            async for answer in self._journal.Read(request):
                if answer.HasField("entry"):
                    number -= 1
                    if not number:
                        return answer.entry.event.value.decode(errors="replace")
        raise AssertionError("the journal ended")


async def test_a_deletion_is_followed_by_a_collection(directory: Path) -> None:
    async with running_app(directory, gc=GcPolicy()) as channel:
        client = Client(channel)
        await client.delete_a_lease(sync=True)  # the first collection is over
        await client.prepare("k")
        await client.delete_a_container()
        assert "k" in await client.removed()


async def test_what_a_removed_snapshot_alone_stood_on_is_collected(directory: Path) -> None:
    async with running_app(directory, gc=GcPolicy()) as channel:
        client = Client(channel)
        await client.delete_a_lease(sync=True)
        await client.prepare("b")
        await client.commit("b", "base")
        await client.prepare("k", "base", **{"containerd.io/gc.root": "now"})
        await client.delete_a_lease(sync=True)
        assert await client.snapshots() == {"base", "k"}
        await client.remove("k")
        assert "base" in await client.removed(2)


@pytest.mark.parametrize("of", ["lease", "image"])
async def test_only_a_synchronous_deletion_is_collected_at_once(directory: Path, of: str) -> None:
    async with running_app(directory, gc=GcPolicy(pause_threshold=0.00001)) as channel:
        client = Client(channel)
        delete = client.delete_a_lease if of == "lease" else client.delete_an_image
        await delete(sync=True)
        await client.prepare("k")
        for _ in range(5):
            await delete(sync=False)
            await client.delete_a_container()
        assert await client.snapshots() == {"k"}
        await delete(sync=True)
        assert await client.snapshots() == set()


async def test_after_so_many_deletions_a_collection_does_not_wait(directory: Path) -> None:
    policy = GcPolicy(pause_threshold=0.00001, deletion_threshold=3)
    async with running_app(directory, gc=policy) as channel:
        client = Client(channel)
        await client.delete_a_lease(sync=True)
        await client.prepare("k")
        for _ in range(2):
            await client.delete_a_container()
        assert await client.snapshots() == {"k"}
        await client.delete_a_container()
        assert "k" in await client.removed()


async def test_a_collection_that_a_kill_came_before_is_made_by_the_next_start(
    directory: Path,
) -> None:
    async with ContainerdProcess(directory, options=(LONG,)) as containerd:
        async with connect(containerd.address, namespace="test") as channel:
            client = Client(channel)
            await client.delete_a_lease(sync=True)
            await client.prepare("k")
            await client.delete_a_container()  # to be collected in some minutes
            assert await client.snapshots() == {"k"}
        await containerd.kill()
        await containerd.start()
        async with connect(containerd.address, namespace="test") as channel:
            assert "k" in await Client(channel).removed()
        assert await containerd.stop() == 0
