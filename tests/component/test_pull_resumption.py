"""A pull during which containerd dies, or is restarted: the next one fetches only the rest."""

import asyncio
import random

import pytest

from protos.containerd.services.content.v1 import content_pb2, content_pb2_grpc
from protos.containerd.services.leases.v1 import leases_pb2, leases_pb2_grpc
from protos.containerd.services.snapshots.v1 import snapshots_pb2, snapshots_pb2_grpc
from services.common.errors import TheseusError
from services.containerd.content.digest import chain_ids
from services.containerd.content.store import CHUNK_BYTES
from services.daemon.clients.connection import Connection
from services.daemon.clients.transfer import ContainerdTransfer
from services.daemon.images.node import Platform
from tests.fakes.containerd import ContainerdProcess, node_directory
from tests.fakes.images import Blobs, build_image
from tests.fakes.registry import FakeRegistry, Fault

pytestmark = pytest.mark.root

LAYER_BYTES = 8 << 20


@pytest.fixture
async def containerd():
    async with (
        node_directory() as directory,
        ContainerdProcess(directory, ("--drain-time=0.5",)) as process,
    ):
        yield process


class Client:
    """The daemon's client of one life of containerd."""

    def __init__(self, containerd):
        self._connection = Connection(containerd.address, "a")

    async def __aenter__(self):
        self.content = content_pb2_grpc.ContentStub(self._connection.channel)
        self._snapshots = snapshots_pb2_grpc.SnapshotsStub(self._connection.channel)
        self.leases = leases_pb2_grpc.LeasesStub(self._connection.channel)
        return self

    async def __aexit__(self, *_):
        await self._connection.channel.close()

    async def pull(self, reference):
        await ContainerdTransfer(self._connection).pull(
            reference,
            platform=Platform("linux", "amd64"),
            snapshotter="overlayfs",
            progress=lambda _: None,
        )

    async def arrived(self, whole, part):
        """Wait until one blob is there, and half of another one but for what is in memory."""
        wanted = LAYER_BYTES // 2 - CHUNK_BYTES
        async with asyncio.timeout(20):
            while (  # noqa: ASYNC110 - another process is waited for
                await self.offset(part) < wanted or not await self.has(whole)
            ):
                await asyncio.sleep(0.02)

    async def snapshots(self):
        """Names and parents."""
        request = snapshots_pb2.ListSnapshotsRequest(snapshotter="overlayfs")
        return {
            info.name: info.parent
            async for answer in self._snapshots.List(request)
            for info in answer.info
        }

    async def unpacking(self, count):
        """Wait until so many snapshots are there that are not finished, or left over."""
        async with asyncio.timeout(20):
            while True:
                found = [name for name in await self.snapshots() if name.startswith("extract-")]
                if len(found) == count:
                    return
                await asyncio.sleep(0.02)

    async def offset(self, digest):
        request = content_pb2.ListStatusesRequest()
        statuses = (await self.content.ListStatuses(request)).statuses
        return next((s.offset for s in statuses if s.expected == digest), 0)

    async def has(self, digest):
        return digest in [
            info.digest
            async for answer in self.content.List(content_pb2.ListContentRequest())
            for info in answer.info
        ]


@pytest.mark.parametrize(("how", "stalled"), [("killed", 0), ("restarted", 1)])
async def test_what_arrived_before_an_end_does_not_come_again(how, stalled, containerd):
    """With the lower layer stalled, the upper one is unpacked, and waits for what to stand on."""
    blobs = Blobs()
    noise = [random.Random(seed).randbytes(LAYER_BYTES) for seed in range(2)]
    image = build_image(blobs, [{"a": noise[0]}, {"b": noise[1]}])
    part, whole = image.layers[stalled], image.layers[1 - stalled]
    async with FakeRegistry() as registry:
        reference = registry.serve("lib/x", "1", image.manifest, blobs)
        registry.faults.append(Fault("stall", part.digest, after_bytes=LAYER_BYTES // 2))
        async with Client(containerd) as client:
            pulling = asyncio.create_task(client.pull(reference))
            await client.arrived(whole.digest, part.digest)
            await client.unpacking(1 - stalled)
            await (containerd.kill() if how == "killed" else containerd.stop())
            with pytest.raises(TheseusError):
                await pulling
        await containerd.start()
        async with Client(containerd) as client:
            await client.pull(reference)
            assert await client.has(part.digest)
            assert (await client.leases.List(leases_pb2.ListRequest())).leases == []
            lower, upper = chain_ids(image.diff_ids)
            await client.unpacking(0)
            assert await client.snapshots() == {lower: "", upper: lower}
    total = sum(map(len, blobs.data.values()))
    assert total <= registry.sent_bytes <= 1.1 * total
    assert "Traceback" not in containerd.log  # whoever unpacked is not surprised by the end
