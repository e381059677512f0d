"""Snapshotters of every kind on a database of their own, and services that keep snapshots."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from protos.containerd.services.snapshots.v1 import snapshots_pb2, snapshots_pb2_grpc
from services.common.database import Database
from services.common.metrics import ServerMetrics
from services.common.server import RpcServer, Service
from services.containerd.clients.snapshots import SnapshotsClient
from services.containerd.metadata.schema import MIGRATIONS
from services.containerd.rpc.snapshots import SnapshotsService
from services.containerd.snapshots.native import NativeSnapshotter
from services.containerd.snapshots.overlay import OverlaySnapshotter
from services.containerd.snapshots.remote import RemoteSnapshotter
from services.containerd.snapshots.snapshotter import REBASE
from tests.fakes.snapshot_collaborators import RecordedEvents, RecordedLeases

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from services.containerd.snapshots.recorded import RecordedSnapshotter
    from services.containerd.snapshots.snapshotter import Snapshotter


@asynccontextmanager
async def opened_database(path: Path) -> AsyncIterator[Database]:
    db = Database(path)
    db.open(MIGRATIONS)
    try:
        yield db
    finally:
        db.close()


@asynccontextmanager
async def served(snapshotter: Snapshotter, name: str, socket: Path) -> AsyncIterator[None]:
    """A service that keeps snapshots, under ``name``."""
    server = RpcServer(
        tier="snapshots",
        socket=socket,
        services=[
            Service(
                snapshots_pb2_grpc.add_SnapshotsServicer_to_server,
                SnapshotsService({name: snapshotter}),
                snapshots_pb2.DESCRIPTOR.services_by_name["Snapshots"],
            )
        ],
        metrics=ServerMetrics(),
        reflection=False,
    )
    await server.start()
    try:
        yield
    finally:
        await server.stop(0)


@asynccontextmanager
async def open_snapshotter(
    root: Path, kind: str
) -> AsyncIterator[tuple[RecordedSnapshotter, Database]]:
    """``overlayfs``, ``native``, or ``remote``: one over gRPC whose files an overlayfs keeps."""
    events, leases = RecordedEvents(), RecordedLeases()
    async with opened_database(root / "meta.db") as db:
        if kind == "remote":
            async with opened_database(root / "backend.db") as other:
                kept = OverlaySnapshotter(root / "there", other, events=events, leases=leases)
                await kept.open()
                async with served(kept, kind, root / "s"):
                    client = SnapshotsClient(kind, str(root / "s"))
                    remote = RemoteSnapshotter(
                        client, db, events=events, leases=leases, capabilities=[REBASE]
                    )
                    await remote.open()
                    yield remote, db
                    await client.close()
                await kept.close()
        else:
            make = NativeSnapshotter if kind == "native" else OverlaySnapshotter
            found = make(root, db, events=events, leases=leases)
            await found.open()
            yield found, db
            await found.close()
