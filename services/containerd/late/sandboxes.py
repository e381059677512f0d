"""Sandboxes: their records, and the shims that hold them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from protos.containerd.services.sandbox.v1 import sandbox_pb2, sandbox_pb2_grpc
from services.common.server import Service
from services.containerd.clients.foreign_shim import has_sandboxes
from services.containerd.rpc.sandboxes import SandboxControllerService, SandboxStoreService
from services.containerd.sandboxes.controller import SandboxController
from services.containerd.sandboxes.local import LocalSandboxStore

if TYPE_CHECKING:
    from services.containerd.late.foundations import Foundations


async def make(on: Foundations) -> list[Service]:
    """Store and Controller."""
    controller = SandboxController(
        on.shims,
        find_launcher=on.tasks.launcher,
        has_sandboxes=has_sandboxes,
        db=on.db,
        events=on.journal,
    )
    names = sandbox_pb2.DESCRIPTOR.services_by_name
    return [
        Service(
            sandbox_pb2_grpc.add_ControllerServicer_to_server,
            SandboxControllerService(controller, on.draining),
            names["Controller"],
        ),
        Service(
            sandbox_pb2_grpc.add_StoreServicer_to_server,
            SandboxStoreService(LocalSandboxStore(on.db)),
            names["Store"],
        ),
    ]
