"""What the late parts are built on: objects that containerd has from its start."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping
    from contextlib import AsyncExitStack
    from pathlib import Path

    from services.common.database import Database
    from services.common.disk import DiskFloor
    from services.common.draining import Draining
    from services.containerd.config import Config
    from services.containerd.content.local import LocalContentStore
    from services.containerd.events.journal import Journal
    from services.containerd.images.local import LocalImageStore
    from services.containerd.leases.manager import LeaseManager
    from services.containerd.metrics import ContainerdMetrics
    from services.containerd.snapshots.recorded import RecordedSnapshotter
    from services.containerd.tasks.manager import TaskManager
    from services.containerd.tasks.shims import ShimManager


class Foundations(NamedTuple):
    """Objects by their roles.

    ``stack`` closes what a part opens, after the last call has ended.
    """

    config: Config
    scratch: Path
    db: Database
    floor: DiskFloor
    journal: Journal
    content: LocalContentStore
    images: LocalImageStore
    leases: LeaseManager
    snapshotters: Mapping[str, RecordedSnapshotter]
    metrics: ContainerdMetrics
    shims: ShimManager
    tasks: TaskManager
    draining: Draining
    stack: AsyncExitStack
