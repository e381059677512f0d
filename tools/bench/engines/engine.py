"""What is asked of every engine, whatever its API looks like."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from tools.bench.engines.server import Server
    from tools.bench.figures import Subject
    from tools.bench.pictures import Pictures

TRUE = ("true",)
ECHO = ("echo", "ok")
SAID = b"ok\n"
IDLE = ("sh", "-c", "trap 'exit 0' TERM; sleep 100000 & wait")
"""Sits there until it is told to end, and then ends well."""

CALL_S = 120.0
"""No call may take longer."""


@dataclass(frozen=True, slots=True)
class Client:
    """A command line client: its command, and what lists containers with it."""

    name: str
    command: Sequence[str]
    listing: Sequence[str]


class BenchError(Exception):
    """An engine did not do what it was asked to; what it did cannot be compared."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A container to be.

    Attributes:
        command: with its arguments.
        runtime: runc or crun.
        network: none or bridge.
        picture: reference of the image; empty: busybox.
        binds: host path to path in the container, read-only.
        log: whether its output is kept.
        group: those with the same name share a shim, where the engine has that; empty: none.
    """

    command: Sequence[str] = TRUE
    runtime: str = "runc"
    network: str = "none"
    picture: str = ""
    binds: Mapping[str, str] | None = None
    log: bool = False
    group: str = ""


class Engine(Protocol):
    """An engine below ``place``, with its ``root`` on a disk of its own.

    Every call ends when the engine's answer is there, and raises :class:`BenchError`, or what its
    client raises, if that is not the answer that was to be. Nothing is cached here.

    Attributes:
        subject: who it is in the report.
        api: whose API it is asked by: ``containerd's`` or ``the daemon's``.
        networks: which kinds of network it makes.
        servers: its long-lived programs in the order in which they start.
    """

    subject: ClassVar[Subject]
    api: ClassVar[str]
    networks: ClassVar[tuple[str, ...]]
    place: Path
    servers: tuple[Server, ...]

    def __init__(self, place: Path, pictures: Pictures) -> None: ...

    async def start(self) -> None:
        """Start the servers; returns when all answer."""

    async def close(self) -> None:
        """End them. Containers may run on."""

    async def forget(self) -> None:
        """Close the client's connections; the next call makes new ones."""

    async def version(self) -> str:
        """Name and version of the engine."""

    async def pull(self, reference: str) -> None:
        """Fetch and unpack an image."""

    async def remove_image(self, reference: str) -> None:
        """Remove an image; its space may be freed later."""

    async def run(self, plan: Plan) -> int:
        """Create, start, wait for the end, remove. Returns the exit code."""

    async def record(self, plan: Plan) -> str:
        """Create no more than what a list of containers shows. Returns its id."""

    async def discard(self, container: str) -> None:
        """Remove a mere record."""

    async def create(self, plan: Plan) -> str:
        """Create all that can be before the command is started. Returns the container's id."""

    async def begin(self, container: str) -> None:
        """Start the command."""

    async def wait(self, container: str) -> int:
        """Wait for the end of a container that was started. Returns its exit code."""

    async def execute(self, container: str) -> int:
        """Run another command in it to its end. Returns the exit code.

        It is ``echo ok`` where its output can be attached to, which then is compared, and ``true``
        where output goes nowhere.
        """

    async def stop(self, container: str) -> int:
        """Send SIGTERM and wait for the end. Returns the exit code."""

    async def remove(self, container: str) -> None:
        """Remove a container that has ended."""

    async def destroy(self, container: str) -> None:
        """Kill and remove it, whatever state it is in."""

    async def count(self) -> int:
        """List all containers; returns how many there are."""

    async def running(self) -> int:
        """How many are listed as running."""

    async def inspect(self, container: str) -> None:
        """Fetch all that is known of one container."""

    async def log_path(self, container: str) -> Path:
        """Where its output is kept."""

    def client(self) -> Client | None:
        """The command line client that comes with it."""

    def tier(self, pid: int, argv: Sequence[str]) -> str:
        """Which of ``daemon``, ``containerd`` and ``shim`` a process of this engine belongs to."""
