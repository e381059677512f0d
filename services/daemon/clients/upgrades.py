"""containerd's upgrades of shims."""

from __future__ import annotations

from typing import TYPE_CHECKING

from protos.theseus.shim.v1 import upgrades_pb2 as pb
from protos.theseus.shim.v1 import upgrades_pb2_grpc
from services.daemon.upgrades import UpgradedShim

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from services.daemon.clients.connection import Connection

_TIMEOUT_S = 3600.0


class ContainerdUpgrades:
    """:class:`services.daemon.upgrades.ShimUpgrader` on containerd."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._stub = upgrades_pb2_grpc.UpgradesStub(connection.channel)

    async def upgrade(self, container_ids: Sequence[str]) -> AsyncIterator[UpgradedShim]:
        """See the interface."""
        request = pb.UpgradeShimsRequest(container_ids=container_ids)
        with self._connection.calls():
            async for done in self._stub.UpgradeShims(request, timeout=_TIMEOUT_S):
                yield UpgradedShim(
                    done.container_id,
                    version_before=done.version_before,
                    version=done.version,
                    downtime_us=done.downtime_us,
                    error=done.error,
                )
