"""containerd's snapshots."""

from __future__ import annotations

import datetime
from collections import OrderedDict
from typing import TYPE_CHECKING

from protos.containerd.services.snapshots.v1 import snapshots_pb2 as pb
from protos.containerd.services.snapshots.v1 import snapshots_pb2_grpc
from services.common.errors import AlreadyExists, NotFound
from services.daemon.clients.connection import TIMEOUT_S
from services.daemon.containers.runtime import RootMount

if TYPE_CHECKING:
    from collections.abc import Iterable

    from protos.containerd.types import mount_pb2
    from services.daemon.clients.connection import Connection

_GC_ROOT = "containerd.io/gc.root"
_FRESH_MAX = 128


def from_mounts(mounts: Iterable[mount_pb2.Mount]) -> list[RootMount]:
    """Mounts out of their messages."""
    return [
        RootMount(mount.type, mount.source, mount.target, tuple(mount.options)) for mount in mounts
    ]


class ContainerdSnapshots:
    """:class:`services.daemon.containers.runtime.Snapshots` on one of containerd's snapshotters."""

    def __init__(self, connection: Connection, snapshotter: str) -> None:
        self._connection = connection
        self._snapshotter = snapshotter
        self._stub = snapshots_pb2_grpc.SnapshotsStub(connection.channel)
        # Of snapshots that were just made: whoever mounts one first need not ask. Where a snapshot
        # lies does not change while it is there.
        self._fresh: OrderedDict[str, list[RootMount]] = OrderedDict()

    async def prepare(self, key: str, parent: str) -> list[RootMount]:
        """See the interface."""
        # A root of the collector: containerd's own record of the container comes and goes.
        now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        request = pb.PrepareSnapshotRequest(
            snapshotter=self._snapshotter, key=key, parent=parent, labels={_GC_ROOT: now}
        )
        try:
            with self._connection.calls():
                answer = await self._stub.Prepare(request, timeout=TIMEOUT_S)
        except AlreadyExists:  # an answer was lost, and the call made again
            return await self.mounts(key)
        while len(self._fresh) >= _FRESH_MAX:
            self._fresh.popitem(last=False)
        made = self._fresh[key] = from_mounts(answer.mounts)
        return made

    async def mounts(self, key: str) -> list[RootMount]:
        """See the interface."""
        if (made := self._fresh.pop(key, None)) is not None:
            return made
        request = pb.MountsRequest(snapshotter=self._snapshotter, key=key)
        with self._connection.calls():
            answer = await self._stub.Mounts(request, timeout=TIMEOUT_S)
        return from_mounts(answer.mounts)

    async def remove(self, key: str) -> None:
        """See the interface."""
        self._fresh.pop(key, None)
        request = pb.RemoveSnapshotRequest(snapshotter=self._snapshotter, key=key)
        try:
            with self._connection.calls():
                await self._stub.Remove(request, timeout=TIMEOUT_S)
        except NotFound:
            return

    async def usage(self, key: str) -> int:
        """See the interface."""
        request = pb.UsageRequest(snapshotter=self._snapshotter, key=key)
        try:
            with self._connection.calls():
                answer = await self._stub.Usage(request, timeout=TIMEOUT_S)
        except NotFound:
            return 0
        return answer.size
