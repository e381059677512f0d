"""The services Snapshots and Diff over a socket, as a client of containerd sees them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.timestamp_pb2 import Timestamp

from protos.containerd.services.diff.v1 import diff_pb2, diff_pb2_grpc
from protos.containerd.services.snapshots.v1 import snapshots_pb2 as pb
from protos.containerd.services.snapshots.v1 import snapshots_pb2_grpc
from protos.containerd.types import descriptor_pb2, mount_pb2
from services.common.database import Database
from services.common.errors import DataLoss
from services.common.metrics import ServerMetrics
from services.common.mounts import Mount
from services.common.server import RpcServer, Service
from services.containerd.content.descriptor import Descriptor
from services.containerd.metadata.schema import MIGRATIONS
from services.containerd.rpc.diff import DiffService
from services.containerd.rpc.snapshots import SnapshotsService
from services.containerd.snapshots.overlay import OverlaySnapshotter
from tests.fakes.snapshot_collaborators import RecordedEvents, RecordedLeases

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

IN_TEST = (("containerd-namespace", "test"),)


class RecordingDiffer:
    """An applier and comparer that keeps what it is asked."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    async def apply(
        self,
        namespace: str,
        descriptor: Descriptor,
        mounts: Sequence[Mount],
        *,
        sync: bool = False,
    ) -> Descriptor:
        self.asked.append((namespace, descriptor, mounts, sync))
        if descriptor.digest == "sha256:bad":
            raise DataLoss("the layer's tar is cut short")
        return Descriptor("application/x", "sha256:applied", 7)

    async def compare(self, *positional: Any, **named: Any) -> Descriptor:
        self.asked.append((positional, named))
        return Descriptor("application/y", "sha256:made", 9, {"a": "b"})


@dataclass
class Client:
    snapshots: snapshots_pb2_grpc.SnapshotsAsyncStub
    diff: diff_pb2_grpc.DiffAsyncStub
    differ: RecordingDiffer

    async def prepare(self, key: str, parent: str = "", **more: Any) -> list[mount_pb2.Mount]:
        request = pb.PrepareSnapshotRequest(snapshotter="overlayfs", key=key, parent=parent, **more)
        return list((await self.snapshots.Prepare(request, metadata=IN_TEST)).mounts)

    async def commit(self, name: str, key: str, **more: Any) -> None:
        await self.snapshots.Commit(
            pb.CommitSnapshotRequest(snapshotter="overlayfs", name=name, key=key, **more),
            metadata=IN_TEST,
        )

    async def names(self, *filters: str) -> list[str]:
        request = pb.ListSnapshotsRequest(snapshotter="overlayfs", filters=filters)
        return [
            info.name
            async for part in self.snapshots.List(request, metadata=IN_TEST)
            for info in part.info
        ]


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[Client]:
    db = Database(tmp_path / "meta.db")
    db.open(MIGRATIONS)
    overlay = OverlaySnapshotter(tmp_path, db, events=RecordedEvents(), leases=RecordedLeases())
    await overlay.open()
    differ = RecordingDiffer()
    server = RpcServer(
        tier="containerd",
        socket=tmp_path / "s",
        services=[
            Service(
                snapshots_pb2_grpc.add_SnapshotsServicer_to_server,
                SnapshotsService({overlay.name: overlay}),
                pb.DESCRIPTOR.services_by_name["Snapshots"],
            ),
            Service(
                diff_pb2_grpc.add_DiffServicer_to_server,
                DiffService(differ, differ),
                diff_pb2.DESCRIPTOR.services_by_name["Diff"],
            ),
        ],
        metrics=ServerMetrics(),
    )
    await server.start()
    async with grpc.aio.insecure_channel(f"unix:{tmp_path}/s") as channel:
        stubs: Any = (
            snapshots_pb2_grpc.SnapshotsStub(channel),
            diff_pb2_grpc.DiffStub(channel),
        )
        yield Client(*stubs, differ)
    await server.stop(0)
    db.close()


def refused(code: grpc.StatusCode) -> Any:
    return pytest.raises(grpc.aio.AioRpcError, check=lambda error: error.code() == code)


async def test_the_life_of_a_snapshot(client: Client) -> None:
    (mount,) = await client.prepare("work", labels={"a": "b"})
    assert (mount.type, list(mount.options)) == ("bind", ["rw", "rbind"])
    request: Any = pb.MountsRequest(snapshotter="overlayfs", key="work")
    assert (await client.snapshots.Mounts(request, metadata=IN_TEST)).mounts[0] == mount
    await client.commit("base", "work", labels={"c": "d"})
    request = pb.StatSnapshotRequest(snapshotter="overlayfs", key="base")
    info = (await client.snapshots.Stat(request, metadata=IN_TEST)).info
    assert (info.name, info.kind, dict(info.labels)) == ("base", pb.COMMITTED, {"c": "d"})
    assert info.created_at.seconds > 0
    request = pb.ViewSnapshotRequest(snapshotter="overlayfs", key="look", parent="base")
    view = (await client.snapshots.View(request, metadata=IN_TEST)).mounts[0]
    assert (view.source, list(view.options)) == (mount.source, ["ro", "rbind"])
    request = pb.UsageRequest(snapshotter="overlayfs", key="base")
    usage = await client.snapshots.Usage(request, metadata=IN_TEST)
    assert (usage.inodes, usage.size >= 0) == (1, True)
    request = pb.RemoveSnapshotRequest(snapshotter="overlayfs", key="look")
    await client.snapshots.Remove(request, metadata=IN_TEST)
    await client.snapshots.Cleanup(pb.CleanupRequest(snapshotter="overlayfs"), metadata=IN_TEST)
    assert await client.names() == ["base"]


async def test_commit_takes_a_parent(client: Client) -> None:
    await client.prepare("1")
    await client.commit("base", "1")
    await client.prepare("2")
    await client.commit("top", "2", parent="base")
    request = pb.StatSnapshotRequest(snapshotter="overlayfs", key="top")
    assert (await client.snapshots.Stat(request, metadata=IN_TEST)).info.parent == "base"


async def test_update_follows_the_mask(client: Client) -> None:
    await client.prepare("work", labels={"a": "1", "b": "2"})
    request = pb.UpdateSnapshotRequest(
        snapshotter="overlayfs",
        info=pb.Info(name="work", labels={"a": "x", "b": "y"}),
        update_mask=FieldMask(paths=["labels.a"]),
    )
    info = (await client.snapshots.Update(request, metadata=IN_TEST)).info
    assert dict(info.labels) == {"a": "x", "b": "2"}
    request.update_mask.paths[:] = ["kind"]
    with refused(grpc.StatusCode.INVALID_ARGUMENT):
        await client.snapshots.Update(request, metadata=IN_TEST)


async def test_list_filters(client: Client) -> None:
    await client.prepare("1")
    await client.commit("base", "1", labels={"containerd.io/x": "y"})
    await client.prepare("work", "base")
    assert await client.names("kind==committed") == ["base"]
    assert await client.names("kind==active,parent==base") == ["work"]
    assert await client.names('labels."containerd.io/x"==y') == ["base"]
    assert await client.names("name==work", "name~=^ba") == ["base", "work"]
    assert await client.names("name==none") == []
    assert await client.names("unknown") == []
    with refused(grpc.StatusCode.INVALID_ARGUMENT):
        await client.names("name=")


async def test_long_lists_come_in_parts(client: Client) -> None:
    for number in range(250):
        await client.prepare(f"{number:03}")
    request = pb.ListSnapshotsRequest(snapshotter="overlayfs")
    parts = [len(part.info) async for part in client.snapshots.List(request, metadata=IN_TEST)]
    assert parts == [100, 100, 50]


async def test_errors_have_upstreams_codes(client: Client) -> None:
    await client.prepare("1")
    await client.commit("base", "1")
    await client.prepare("work", "base")
    with refused(grpc.StatusCode.ALREADY_EXISTS):
        await client.prepare("work")
    with refused(grpc.StatusCode.NOT_FOUND):
        await client.prepare("other", "nowhere")
    with refused(grpc.StatusCode.INVALID_ARGUMENT):
        await client.prepare("other", "work")
    request: Any = pb.RemoveSnapshotRequest(snapshotter="overlayfs", key="base")
    with refused(grpc.StatusCode.FAILED_PRECONDITION):
        await client.snapshots.Remove(request, metadata=IN_TEST)
    for name in ("", "zfs"):
        request = pb.StatSnapshotRequest(snapshotter=name, key="base")
        with refused(grpc.StatusCode.INVALID_ARGUMENT):
            await client.snapshots.Stat(request, metadata=IN_TEST)
    request = pb.StatSnapshotRequest(snapshotter="overlayfs", key="base")
    with refused(grpc.StatusCode.FAILED_PRECONDITION):
        await client.snapshots.Stat(request)
    assert await client.names() == ["base", "work"]


async def test_apply(client: Client) -> None:
    mounts = [mount_pb2.Mount(type="bind", source="/s", target="t", options=["rw"])]
    request = diff_pb2.ApplyRequest(
        diff=descriptor_pb2.Descriptor(media_type="m", digest="sha256:x", size=3),
        mounts=mounts,
        sync_fs=True,
    )
    applied = (await client.diff.Apply(request, metadata=IN_TEST)).applied
    assert (applied.media_type, applied.digest, applied.size) == (
        "application/x",
        "sha256:applied",
        7,
    )
    assert client.differ.asked == [
        ("test", Descriptor("m", "sha256:x", 3), [Mount("bind", "/s", "t", ("rw",))], True)
    ]
    request.diff.digest = "sha256:bad"
    with refused(grpc.StatusCode.DATA_LOSS):
        await client.diff.Apply(request, metadata=IN_TEST)


async def test_diff(client: Client) -> None:
    request = diff_pb2.DiffRequest(
        left=[mount_pb2.Mount(type="bind", source="/l")],
        right=[mount_pb2.Mount(type="bind", source="/r")],
        media_type="m",
        ref="ref",
        labels={"x": "y"},
    )
    made = (await client.diff.Diff(request, metadata=IN_TEST)).diff
    assert (made.media_type, made.digest, made.size, dict(made.annotations)) == (
        "application/y",
        "sha256:made",
        9,
        {"a": "b"},
    )
    request.source_date_epoch.CopyFrom(Timestamp(seconds=5))
    await client.diff.Diff(request, metadata=IN_TEST)
    common = {"media_type": "m", "ref": "ref", "labels": {"x": "y"}}
    mounts = ("test", [Mount("bind", "/l")], [Mount("bind", "/r")])
    assert client.differ.asked == [
        (mounts, {**common, "newest_ns": None}),
        (mounts, {**common, "newest_ns": 5_000_000_000}),
    ]
