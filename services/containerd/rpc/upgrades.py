"""``theseus.shim.v1.Upgrades``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from protos.theseus.shim.v1 import upgrades_pb2 as pb
from protos.theseus.shim.v1 import upgrades_pb2_grpc
from services.common.server import request_namespace

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from services.containerd.rpc.context import Context
    from services.containerd.tasks.upgrade import ShimUpgrades


class UpgradesService(upgrades_pb2_grpc.UpgradesServicer):
    """Serves upgrades of shims."""

    def __init__(self, upgrades: ShimUpgrades) -> None:
        self._upgrades = upgrades

    async def UpgradeShims(
        self, request: pb.UpgradeShimsRequest, context: Context
    ) -> AsyncIterator[pb.UpgradeShimsResponse]:
        """See the contract."""
        namespace = request_namespace(context)
        async for done in self._upgrades.upgrade(namespace, request.container_ids):
            yield pb.UpgradeShimsResponse(
                container_id=done.container_id,
                version_before=done.version_before,
                version=done.version,
                generation=done.generation,
                downtime_us=done.downtime_us,
                error=done.error,
            )
