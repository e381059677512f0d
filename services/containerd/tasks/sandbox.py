"""What a shim is to containerd where it holds a sandbox: upstream's sandbox API of shims."""

from __future__ import annotations

from dataclasses import field
from typing import TYPE_CHECKING, Protocol

from services.common.frozen import frozen

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from services.common.mounts import Mount
    from services.containerd.typed import TypedValue


@frozen
class NewSandbox:
    """What a shim needs to make a sandbox."""

    bundle: str
    rootfs: Sequence[Mount] = ()
    options: TypedValue | None = None
    netns_path: str = ""
    annotations: Mapping[str, str] = field(default_factory=dict)


@frozen
class StartedSandbox:
    """A sandbox that was started."""

    pid: int
    created_at_ns: int
    spec: TypedValue | None = None


@frozen
class SandboxEnd:
    """How a sandbox ended."""

    exit_status: int
    exited_at_ns: int


@frozen
class SandboxStatus:
    """A sandbox as its shim describes it."""

    id: str
    pid: int = 0
    state: str = ""
    info: Mapping[str, str] = field(default_factory=dict)
    created_at_ns: int = 0
    exited_at_ns: int = 0
    extra: TypedValue | None = None


class SandboxShim(Protocol):
    """A shim that may hold a sandbox, which has the id of the shim's bundle.

    Every method raises ``Unimplemented`` where the shim has no sandboxes, ``Unavailable`` where it
    cannot be reached, ``NotFound`` where there is no sandbox.
    """

    async def create_sandbox(self, request: NewSandbox) -> None:
        """Make the sandbox."""

    async def start_sandbox(self) -> StartedSandbox:
        """Start it: containers may be in it from now on."""

    async def sandbox_platform(self) -> tuple[str, str, str]:
        """Operating system, architecture and variant of what runs in it."""

    async def stop_sandbox(self, timeout_s: int) -> None:
        """Stop it, and what is in it, within a time; 0: the shim's own."""

    async def wait_sandbox(self) -> SandboxEnd:
        """Return once it has ended."""

    async def sandbox_status(self, *, verbose: bool) -> SandboxStatus:
        """How it is."""

    async def shutdown_sandbox(self) -> None:
        """Take it away."""

    async def sandbox_metrics(self) -> tuple[int, TypedValue | None]:
        """Time in ns, and figures."""
