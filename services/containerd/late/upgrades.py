"""Shims that are to execute another version."""

from __future__ import annotations

from typing import TYPE_CHECKING

from protos.theseus.shim.v1 import upgrades_pb2, upgrades_pb2_grpc
from services.common.server import Service
from services.containerd.rpc.upgrades import UpgradesService
from services.containerd.tasks.upgrade import ShimUpgrades

if TYPE_CHECKING:
    from services.containerd.late.foundations import Foundations


async def make(on: Foundations) -> list[Service]:
    """Upgrades."""
    return [
        Service(
            upgrades_pb2_grpc.add_UpgradesServicer_to_server,
            UpgradesService(ShimUpgrades(on.shims, on.config.shim)),
            upgrades_pb2.DESCRIPTOR.services_by_name["Upgrades"],
        )
    ]
