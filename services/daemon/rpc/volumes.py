"""``theseus.engine.v1.Volumes``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from protos.theseus.engine.v1 import system_pb2 as pb
from protos.theseus.engine.v1 import system_pb2_grpc

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Sequence

    from services.daemon.rpc.context import Context
    from services.daemon.volumes.store import Volume, VolumeStore


class VolumesService(system_pb2_grpc.VolumesServicer):
    """Serves volumes.

    Args:
        volumes: of the engine.
        users: tells, inside a transaction, which containers use a volume.
    """

    def __init__(
        self, volumes: VolumeStore, users: Callable[[sqlite3.Connection, str], Sequence[str]]
    ) -> None:
        self._volumes = volumes
        self._users = users

    async def Create(
        self, request: pb.CreateVolumeRequest, context: Context
    ) -> pb.CreateVolumeResponse:
        """See the contract."""
        volume = await self._volumes.create(request.name, labels=dict(request.labels))
        return pb.CreateVolumeResponse(volume=_to_pb(volume))

    async def List(
        self, request: pb.ListVolumesRequest, context: Context
    ) -> pb.ListVolumesResponse:
        """See the contract."""
        volumes = await self._volumes.list_all()
        return pb.ListVolumesResponse(volumes=[_to_pb(volume) for volume in volumes])

    async def Remove(
        self, request: pb.RemoveVolumeRequest, context: Context
    ) -> pb.RemoveVolumeResponse:
        """See the contract."""
        await self._volumes.remove(request.name, users=self._users)
        return pb.RemoveVolumeResponse()


def _to_pb(volume: Volume) -> pb.Volume:
    return pb.Volume(name=volume.name, mountpoint=str(volume.mountpoint), labels=volume.labels)
