"""What is to be known about the engine itself and the machine under it."""

from __future__ import annotations

import asyncio
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from services.common import VERSION
from services.common.errors import TheseusError
from services.common.frozen import frozen
from services.daemon.containers.oci_runtimes import cgroup_layout

if TYPE_CHECKING:
    from services.daemon.config import Config
    from services.daemon.containers.manager import ContainerManager
    from services.daemon.containers.oci_runtimes import OciRuntime, OciRuntimes
    from services.daemon.images.store import ImageStore
    from services.daemon.spec.host import HostFacts

_OS_RELEASE = Path("/etc/os-release")
_RESOURCE_CAPABILITY = "CAP_SYS_RESOURCE"


class Peer(Protocol):
    """containerd, as far as its being there goes."""

    async def version(self) -> str:
        """Its version; empty when it does not answer."""


@frozen
class Versions:
    """Versions of what works together; ``containerd`` is empty when it does not answer."""

    engine: str
    python: str
    kernel: str
    containerd: str


@frozen
class SystemInfo:
    """State of the engine and of the machine. ``warnings`` are sentences for its user."""

    containers: int
    running: int
    images: int
    runtimes: tuple[OciRuntime, ...]
    default_runtime: str
    cgroup_layout: str
    root: str
    state: str
    kernel: str
    operating_system: str
    cpus: int
    memory_bytes: int
    containerd_ready: bool
    bridge: str
    bridge_subnet: str
    warnings: tuple[str, ...]
    snapshotter: str


class SystemReporter:
    """Looks all of it up when asked."""

    def __init__(
        self,
        config: Config,
        *,
        containerd: Peer,
        containers: ContainerManager,
        images: ImageStore,
        runtimes: OciRuntimes,
        host: HostFacts,
    ) -> None:
        self._config = config
        self._containerd = containerd
        self._containers = containers
        self._images = images
        self._runtimes = runtimes
        self._host = host

    async def versions(self) -> Versions:
        """Versions of the tiers that this daemon sees."""
        return Versions(
            engine=VERSION,
            python=platform.python_version(),
            kernel=os.uname().release,
            containerd=await self._containerd.version(),
        )

    async def info(self) -> SystemInfo:
        """Everything else."""
        ready = bool(await self._containerd.version())
        return SystemInfo(
            containers=len(self._containers.list_all(stopped=True)),
            running=len(self._containers.list_all(stopped=False)),
            images=await self._count_images() if ready else 0,
            runtimes=tuple(self._runtimes.list_all()),
            default_runtime=self._runtimes.default,
            cgroup_layout=cgroup_layout(),
            root=str(self._config.root),
            state=str(self._config.state),
            kernel=os.uname().release,
            operating_system=await asyncio.to_thread(_operating_system),
            cpus=self._host.cpus,
            memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            containerd_ready=ready,
            bridge=self._config.bridge_name,
            bridge_subnet=self._config.bridge_subnet,
            warnings=tuple(self._warnings(ready)),
            snapshotter=self._config.snapshotter,
        )

    async def _count_images(self) -> int:
        try:
            return await self._images.count()
        except TheseusError:
            return 0

    def _warnings(self, ready: bool) -> list[str]:
        warnings = []
        if not ready:
            warnings.append(f"containerd does not answer at {self._config.containerd}")
        if not self._host.swap_limit:
            warnings.append("No swap limit support: memory is limited without swap")
        if _RESOURCE_CAPABILITY not in self._host.capabilities:
            warnings.append(
                f"This daemon lacks {_RESOURCE_CAPABILITY}: limits of processes cannot be raised"
            )
        warnings += [
            f"Runtime {runtime.name} cannot be used: {runtime.reason}"
            for runtime in self._runtimes.list_all()
            if not runtime.usable
        ]
        return warnings


def _operating_system() -> str:
    try:
        lines = _OS_RELEASE.read_text().splitlines()
    except OSError:
        return os.uname().sysname
    values = dict(line.split("=", 1) for line in lines if "=" in line)
    return values.get("PRETTY_NAME", os.uname().sysname).strip('"')
