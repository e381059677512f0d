"""A snapshotter over gRPC: implements ``snapshots.snapshotter.Snapshotter``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from protos.containerd.services.snapshots.v1 import snapshots_pb2 as pb
from protos.containerd.services.snapshots.v1 import snapshots_pb2_grpc
from services.common.client import NAMESPACE_KEY, connect
from services.common.rpc_errors import translated
from services.containerd.rpc.encoding import nanoseconds
from services.containerd.rpc.mounts import from_mounts
from services.containerd.snapshots.snapshotter import Kind, SnapshotInfo, Usage

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from services.common.mounts import Mount

_QUICK_S = 30.0
_SLOW_S = 600.0  # what may copy a tree, or fetch one


class SnapshotsClient:
    """A service on a Unix socket, which need not be there before the first call.

    Args:
        name: what the snapshotter is called, here and there.
        address: the socket.
    """

    def __init__(self, name: str, address: str) -> None:
        self._name = name
        self._address = address
        self._channel = connect(address)
        self._stub = snapshots_pb2_grpc.SnapshotsStub(self._channel)

    @property
    def name(self) -> str:
        """See :class:`Snapshotter`."""
        return self._name

    @property
    def capabilities(self) -> tuple[str, ...]:
        """Not known from the service; the configuration says."""
        return ()

    async def close(self) -> None:
        """Close the channel."""
        await self._channel.close()

    async def stat(self, namespace: str, key: str) -> SnapshotInfo:
        """See :class:`Snapshotter`."""
        request = pb.StatSnapshotRequest(snapshotter=self._name, key=key)
        with translated():
            response = await self._stub.Stat(
                request, timeout=_QUICK_S, metadata=_metadata(namespace)
            )
        return _info(response.info)

    async def update(
        self, namespace: str, key: str, labels: Mapping[str, str], fields: Sequence[str] = ()
    ) -> SnapshotInfo:
        """See :class:`Snapshotter`."""
        request = pb.UpdateSnapshotRequest(
            snapshotter=self._name, info=pb.Info(name=key, labels=dict(labels))
        )
        request.update_mask.paths.extend(fields)
        with translated():
            response = await self._stub.Update(
                request, timeout=_QUICK_S, metadata=_metadata(namespace)
            )
        return _info(response.info)

    async def usage(self, namespace: str, key: str) -> Usage:
        """See :class:`Snapshotter`."""
        request = pb.UsageRequest(snapshotter=self._name, key=key)
        with translated():
            response = await self._stub.Usage(
                request, timeout=_SLOW_S, metadata=_metadata(namespace)
            )
        return Usage(response.inodes, response.size)

    async def mounts(self, namespace: str, key: str) -> list[Mount]:
        """See :class:`Snapshotter`."""
        request = pb.MountsRequest(snapshotter=self._name, key=key)
        with translated():
            response = await self._stub.Mounts(
                request, timeout=_QUICK_S, metadata=_metadata(namespace)
            )
        return from_mounts(response.mounts)

    async def prepare(
        self, namespace: str, key: str, parent: str, labels: Mapping[str, str] | None = None
    ) -> list[Mount]:
        """See :class:`Snapshotter`."""
        request = pb.PrepareSnapshotRequest(
            snapshotter=self._name, key=key, parent=parent, labels=dict(labels or {})
        )
        with translated():
            response = await self._stub.Prepare(
                request, timeout=_SLOW_S, metadata=_metadata(namespace)
            )
        return from_mounts(response.mounts)

    async def view(
        self, namespace: str, key: str, parent: str, labels: Mapping[str, str] | None = None
    ) -> list[Mount]:
        """See :class:`Snapshotter`."""
        request = pb.ViewSnapshotRequest(
            snapshotter=self._name, key=key, parent=parent, labels=dict(labels or {})
        )
        with translated():
            response = await self._stub.View(
                request, timeout=_SLOW_S, metadata=_metadata(namespace)
            )
        return from_mounts(response.mounts)

    async def commit(
        self,
        namespace: str,
        name: str,
        key: str,
        labels: Mapping[str, str] | None = None,
        *,
        parent: str = "",
    ) -> None:
        """See :class:`Snapshotter`."""
        request = pb.CommitSnapshotRequest(
            snapshotter=self._name, name=name, key=key, labels=dict(labels or {}), parent=parent
        )
        with translated():
            await self._stub.Commit(request, timeout=_SLOW_S, metadata=_metadata(namespace))

    async def remove(self, namespace: str, key: str) -> None:
        """See :class:`Snapshotter`."""
        request = pb.RemoveSnapshotRequest(snapshotter=self._name, key=key)
        with translated():
            await self._stub.Remove(request, timeout=_SLOW_S, metadata=_metadata(namespace))

    async def infos(self, namespace: str) -> list[SnapshotInfo]:
        """See :class:`Snapshotter`."""
        request = pb.ListSnapshotsRequest(snapshotter=self._name)
        with translated():
            return [
                _info(info)
                async for response in self._stub.List(
                    request, timeout=_SLOW_S, metadata=_metadata(namespace)
                )
                for info in response.info
            ]

    async def cleanup(self) -> None:
        """See :class:`Snapshotter`."""
        request = pb.CleanupRequest(snapshotter=self._name)
        with translated():
            # Upstream's services ask for a namespace even where it means nothing.
            await self._stub.Cleanup(request, timeout=_SLOW_S, metadata=_metadata("default"))


def _metadata(namespace: str) -> tuple[tuple[str, str]]:
    return ((NAMESPACE_KEY, namespace),)


def _info(message: pb.Info) -> SnapshotInfo:
    return SnapshotInfo(
        message.name,
        Kind(message.kind),
        message.parent,
        dict(message.labels),
        nanoseconds(message.created_at),
        nanoseconds(message.updated_at),
    )
