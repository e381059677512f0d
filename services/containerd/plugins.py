"""The parts of containerd as its clients know them: plugins, with a type and an id.

Nothing is plugged in here but proxy snapshotters; the list exists so that a client finds what it
looks for, such as the snapshotters and the platforms that they are good for. Types and ids are
upstream's.
"""

from __future__ import annotations

from dataclasses import field
from typing import TYPE_CHECKING

from services.common.frozen import frozen
from services.containerd.durations import format_duration
from services.containerd.filters import parse

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from services.containerd.content.descriptor import Platform
    from services.containerd.gc.policy import GcPolicy

CONTENT = "io.containerd.content.v1"
SNAPSHOTTER = "io.containerd.snapshotter.v1"
METADATA = "io.containerd.metadata.v1"
GC = "io.containerd.gc.v1"
DIFFER = "io.containerd.differ.v1"
EVENT = "io.containerd.event.v1"
LEASE = "io.containerd.lease.v1"
MONITOR = "io.containerd.monitor.v1"
RUNTIME = "io.containerd.runtime.v2"
SANDBOX_STORE = "io.containerd.sandbox.store.v1"
SANDBOX_CONTROLLER = "io.containerd.sandbox.controller.v1"
STREAMING = "io.containerd.streaming.v1"
TRANSFER = "io.containerd.transfer.v1"
SERVICE = "io.containerd.service.v1"
GRPC = "io.containerd.grpc.v1"
INTERNAL = "io.containerd.internal.v1"

_SERVED = {
    "containers": (METADATA,),
    "content": (METADATA,),
    "diff": (DIFFER,),
    "events": (EVENT,),
    "healthcheck": (),
    "images": (METADATA, GC),
    "introspection": (),
    "leases": (LEASE, GC),
    "namespaces": (METADATA,),
    "sandbox-controllers": (SANDBOX_CONTROLLER, EVENT),
    "sandboxes": (SANDBOX_STORE,),
    "snapshots": (METADATA,),
    "streaming": (STREAMING,),
    "tasks": (RUNTIME,),
    "transfer": (TRANSFER, STREAMING),
    "version": (),
}


@frozen
class Plugin:
    """One part. ``error`` says why it cannot be used; empty: it can."""

    type: str
    id: str
    requires: tuple[str, ...] = ()
    platforms: tuple[Platform, ...] = ()
    exports: Mapping[str, str] = field(default_factory=dict)
    capabilities: tuple[str, ...] = ()
    error: str = ""


@frozen
class Plugged:
    """What is told of a snapshotter: ``root``, its directory, or ``address``, its socket."""

    exports: Mapping[str, str]
    capabilities: tuple[str, ...] = ()


def list_plugins(
    *, platform: Platform, content_root: str, snapshotters: Mapping[str, Plugged], gc: GcPolicy
) -> list[Plugin]:
    """All parts, those that others need first.

    Args:
        platform: what this machine runs.
        content_root: directory of the content store.
        snapshotters: where each is, and what it can do, by name.
        gc: how often garbage is collected.
    """
    found = [
        Plugin(CONTENT, "content", exports={"root": content_root}),
        *(
            Plugin(
                SNAPSHOTTER,
                name,
                platforms=(platform,),
                exports=plugged.exports,
                capabilities=plugged.capabilities,
            )
            for name, plugged in sorted(snapshotters.items())
        ),
        Plugin(METADATA, "bolt", requires=(CONTENT, SNAPSHOTTER)),
        Plugin(EVENT, "exchange"),
        Plugin(GC, "scheduler", requires=(METADATA,), exports=_thresholds(gc)),
        Plugin(LEASE, "manager", requires=(METADATA,)),
        Plugin(DIFFER, "walking", requires=(METADATA,), platforms=(platform,)),
        Plugin(RUNTIME, "task", requires=(METADATA, EVENT), platforms=(platform,)),
        Plugin(SANDBOX_STORE, "local", requires=(METADATA,)),
        Plugin(SANDBOX_CONTROLLER, "shim", requires=(RUNTIME, EVENT), platforms=(platform,)),
        Plugin(STREAMING, "manager", requires=(METADATA,)),
        Plugin(TRANSFER, "local", requires=(LEASE, METADATA, DIFFER, STREAMING)),
    ]
    found += [Plugin(GRPC, name, requires=requires) for name, requires in _SERVED.items()]
    return found


def find(all_plugins: Sequence[Plugin], filters: Sequence[str]) -> list[Plugin]:
    """Those that match any of the filters on ``type`` and ``id``.

    Raises:
        InvalidArgument: a filter does not parse.
    """
    wanted = parse(filters)
    return [plugin for plugin in all_plugins if wanted.matches(_fields(plugin))]


def _thresholds(gc: GcPolicy) -> dict[str, str]:
    return {
        "PauseThreshold": f"{gc.pause_threshold:g}",
        "DeletionThreshold": str(gc.deletion_threshold),
        "MutationThreshold": str(gc.mutation_threshold),
        "ScheduleDelay": format_duration(gc.schedule_delay_s),
    }


def _fields(plugin: Plugin) -> Callable[[Sequence[str]], str | None]:
    return lambda path: {"type": plugin.type, "id": plugin.id}.get(path[0])
