"""The list of what is served on containerd's socket: every contract with its implementation."""

from __future__ import annotations

import asyncio
import importlib
from typing import TYPE_CHECKING, Any

from protos.containerd.services.containers.v1 import containers_pb2, containers_pb2_grpc
from protos.containerd.services.content.v1 import content_pb2, content_pb2_grpc
from protos.containerd.services.events.v1 import events_pb2, events_pb2_grpc
from protos.containerd.services.images.v1 import images_pb2, images_pb2_grpc
from protos.containerd.services.introspection.v1 import introspection_pb2, introspection_pb2_grpc
from protos.containerd.services.leases.v1 import leases_pb2, leases_pb2_grpc
from protos.containerd.services.namespaces.v1 import namespace_pb2, namespace_pb2_grpc
from protos.containerd.services.snapshots.v1 import snapshots_pb2, snapshots_pb2_grpc
from protos.containerd.services.tasks.v1 import tasks_pb2, tasks_pb2_grpc
from protos.containerd.services.version.v1 import version_pb2, version_pb2_grpc
from protos.theseus.journal.v1 import journal_pb2, journal_pb2_grpc
from protos.theseus.shim.v1 import registry_pb2, registry_pb2_grpc, streams_pb2
from protos.theseus.tasks.v1 import runs_pb2, runs_pb2_grpc
from services.common.late_services import LateServices
from services.common.server import Service
from services.containerd.rpc.streams import add_streams_to_server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from services.containerd.late.foundations import Foundations

_CONTRACTS: dict[str, tuple[Any, Callable[[Any, Any], None]]] = {
    "containers": (containers_pb2, containers_pb2_grpc.add_ContainersServicer_to_server),
    "content": (content_pb2, content_pb2_grpc.add_ContentServicer_to_server),
    "events": (events_pb2, events_pb2_grpc.add_EventsServicer_to_server),
    "images": (images_pb2, images_pb2_grpc.add_ImagesServicer_to_server),
    "introspection": (
        introspection_pb2,
        introspection_pb2_grpc.add_IntrospectionServicer_to_server,
    ),
    "journal": (journal_pb2, journal_pb2_grpc.add_JournalServicer_to_server),
    "leases": (leases_pb2, leases_pb2_grpc.add_LeasesServicer_to_server),
    "namespaces": (namespace_pb2, namespace_pb2_grpc.add_NamespacesServicer_to_server),
    "registry": (registry_pb2, registry_pb2_grpc.add_RegistryServicer_to_server),
    "runs": (runs_pb2, runs_pb2_grpc.add_RunsServicer_to_server),
    "snapshots": (snapshots_pb2, snapshots_pb2_grpc.add_SnapshotsServicer_to_server),
    "streams": (streams_pb2, add_streams_to_server),
    "tasks": (tasks_pb2, tasks_pb2_grpc.add_TasksServicer_to_server),
    "version": (version_pb2, version_pb2_grpc.add_VersionServicer_to_server),
}

_LATE = {
    "sandboxes": (
        "containerd.services.sandbox.v1.Controller",
        "containerd.services.sandbox.v1.Store",
    ),
    "transfers": (
        "containerd.services.diff.v1.Diff",
        "containerd.services.streaming.v1.Streaming",
        "containerd.services.transfer.v1.Transfer",
    ),
    "upgrades": ("theseus.shim.v1.Upgrades",),
}
"""Modules of services.containerd.late, with the services that each makes."""


def services(servicers: Iterable[tuple[str, object]]) -> list[Service]:
    """What an :class:`RpcServer` takes.

    Args:
        servicers: name of each contract, with what implements it.
    """
    found = []
    for name, servicer in servicers:
        module, add = _CONTRACTS[name]
        (descriptor,) = module.DESCRIPTOR.services_by_name.values()
        found.append(Service(add, servicer, descriptor))
    return found


def late_services(foundations: Foundations) -> list[LateServices]:
    """Those that are made for their first call."""

    def late(part: str, names: tuple[str, ...]) -> LateServices:
        async def make() -> list[Service]:
            module = await asyncio.to_thread(
                importlib.import_module, f"services.containerd.late.{part}"
            )
            made: list[Service] = await module.make(foundations)
            return made

        return LateServices(names, make)

    return [late(part, names) for part, names in _LATE.items()]
