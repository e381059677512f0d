"""The collaborators that every operation on containers shares, in one hand."""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.common.frozen import frozen

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from services.daemon.containers.exec_store import ExecStore
    from services.daemon.containers.files import ContainerFiles
    from services.daemon.containers.init_processes import InitProcesses
    from services.daemon.containers.locks import OperationLocks
    from services.daemon.containers.observer import Observer
    from services.daemon.containers.runtime import RuntimeContainers, Snapshots, Tasks
    from services.daemon.containers.store import ContainerStore
    from services.daemon.networks.network import Network
    from services.daemon.volumes.store import VolumeStore


def no_trace(_step: str) -> None:
    """Does nothing; tests of crashes put something else in its place."""


@frozen
class Below:
    """What containers are made of, and made with.

    Attributes:
        store: the records.
        execs: those of further processes.
        locks: one operation at a time on one container.
        containers, snapshots, tasks: containerd's.
        init_processes: what containers were started as.
        snapshotter: name of the snapshotter that ``snapshots`` uses.
        network: the default bridge.
        netns_directory: where network namespaces are mounted.
        scratch: directory for mounts of a moment.
        trace: called with a step's name when the step is done.
    """

    store: ContainerStore
    execs: ExecStore
    locks: OperationLocks
    containers: RuntimeContainers
    init_processes: InitProcesses
    snapshots: Snapshots
    tasks: Tasks
    snapshotter: str
    network: Network
    netns_directory: Path
    volumes: VolumeStore
    files: ContainerFiles
    scratch: Path
    observer: Observer
    trace: Callable[[str], None] = no_trace
