"""What a shim is to containerd: the process that owns the processes of one container.

A process is named by an exec id; the container's first process (init) has the empty one. A task is
``created`` by ``create``, ``running`` after ``start``, ``stopped`` once init has ended, and stays
so, with its exit status, until ``delete``; the shim itself goes after ``shutdown``.

An exit status is true or it is not given: where nobody can know it, ``wait`` and ``delete`` raise
``DataLoss`` with the reason, and ``state`` answers ``UNKNOWN``.
"""

from __future__ import annotations

from dataclasses import field
from enum import Enum
from typing import TYPE_CHECKING, Protocol

from services.common.errors import NotFound
from services.common.frozen import frozen

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from services.common.message_stream import MessageStream
    from services.common.mounts import Mount
    from services.containerd.tasks.line import ShimLine, Way
    from services.containerd.tasks.processes import ProcessId
    from services.containerd.typed import TypedValue


class TaskNotFound(NotFound):
    """The container has no task."""


class TaskStatus(Enum):
    """State of a process; the numbers are those of ``containerd.v1.types.Status``."""

    UNKNOWN = 0
    CREATED = 1
    RUNNING = 2
    STOPPED = 3
    PAUSED = 4
    PAUSING = 5


@frozen
class Stdio:
    """Where the standard streams of a process go: URIs or paths; empty is /dev/null."""

    stdin: str = ""
    stdout: str = ""
    stderr: str = ""
    terminal: bool = False


@frozen
class CreateTask:
    """What a shim needs to create its container; config.json is in the bundle."""

    bundle: str
    rootfs: tuple[Mount, ...] = ()
    stdio: Stdio = field(default_factory=Stdio)
    checkpoint: str = ""
    options: TypedValue | None = None


@frozen
class ProcessExit:
    """How a process ended: its true exit status, 128 plus the number for a death by signal."""

    exit_status: int
    exited_at_ns: int
    pid: int = 0


@frozen
class ProcessState:
    """State of a process, as far as its shim knows it.

    ``exit_status`` and ``exited_at_ns`` mean something in ``STOPPED`` only. ``id`` is the exec id,
    and the container's id for init.
    """

    id: str
    pid: int
    status: TaskStatus
    stdio: Stdio = field(default_factory=Stdio)
    exit_status: int = 0
    exited_at_ns: int = 0


@frozen
class ProcessInfo:
    """A process found in the container, whoever started it."""

    pid: int
    info: TypedValue | None = None


@frozen
class ShimInfo:
    """Answer of ``connect``: who the shim is. ``task_pid`` is 0 while there is no task."""

    shim_pid: int
    task_pid: int
    version: str


@frozen
class ProgramInfo:
    """Answer of ``info``: the program that a shim runs, and how often it was re-executed."""

    version: str
    generation: int


@frozen
class Reexecuted:
    """Answer of ``reexec``: what runs now."""

    version: str
    generation: int
    downtime_us: int


@frozen
class ShimRequest:
    """What a shim is started with; ``instance_id`` is in the bundle's shim.json already.

    With ``adopt`` it takes over the container of a shim that died, instead of waiting for one.
    ``options`` are the runtime's, for shims that others wrote. With ``ahead`` it need not serve yet
    when its address is told: calls wait for that, and one that fails asks ``ShimAddress.line`` why.
    """

    namespace: str
    id: str
    bundle: Path
    socket: Path
    instance_id: str
    adopt: bool = False
    options: TypedValue | None = None
    ahead: bool = False


@frozen
class ShimAddress:
    """A shim that serves, or is about to; ``line`` is what it was asked on, if it waited."""

    process: ProcessId
    address: str
    version: str
    line: ShimLine | None = None


class Shim(Protocol):
    """One shim. Every method raises ``Unavailable`` when the shim cannot be reached now."""

    async def create(self, request: CreateTask) -> int:
        """Mount the root file system and create the container; returns init's pid.

        Raises:
            AlreadyExists: it was created before.
            InvalidArgument: the runtime refuses the configuration.
            NotFound: the runtime's binary, or the command, is not there.
        """

    async def start(self, exec_id: str) -> int:
        """Start a process; returns its pid.

        Raises:
            NotFound: there is no such exec.
            FailedPrecondition: it was started before.
        """

    async def kill(self, exec_id: str, signal: int, *, every: bool = False) -> None:
        """Send a signal to a process, or to every process of the container.

        Raises:
            NotFound: there is no such exec, or it has ended.
        """

    async def exec(self, exec_id: str, stdio: Stdio, spec: TypedValue) -> None:
        """Add a process (an OCI ``Process``), which ``start`` starts.

        Raises:
            AlreadyExists: the exec id is taken.
            FailedPrecondition: the container does not run.
        """

    async def wait(self, exec_id: str) -> ProcessExit:
        """Return once the process has ended.

        Raises:
            NotFound: there is no such exec.
            DataLoss: it ended and nobody can know how.
        """

    async def delete(self, exec_id: str) -> ProcessExit:
        """Take away a process that has ended or never started.

        Raises:
            NotFound: there is no such exec, or the task was deleted before.
            FailedPrecondition: it runs.
            DataLoss: it is deleted; nobody can know how it ended.
        """

    async def state(self, exec_id: str) -> ProcessState:
        """State of a process.

        Raises:
            NotFound: there is no such exec.
        """

    async def pids(self) -> list[ProcessInfo]:
        """Every process in the container."""

    async def pause(self) -> None:
        """Freeze the container."""

    async def resume(self) -> None:
        """Let a frozen container go on."""

    async def resize(self, exec_id: str, width: int, height: int) -> None:
        """Set the size of a terminal, in characters.

        Raises:
            FailedPrecondition: the process has no terminal.
        """

    async def close_io(self, exec_id: str) -> None:
        """Close the shim's end of a process' standard input."""

    async def update(self, resources: TypedValue | None, annotations: Mapping[str, str]) -> None:
        """Change the container's resource limits (an OCI ``LinuxResources``)."""

    async def stats(self) -> TypedValue:
        """Figures of the container's cgroup."""

    async def checkpoint(self, path: str, options: TypedValue | None) -> None:
        """Save the container's state below ``path``.

        Raises:
            FailedPrecondition: the runtime or the kernel cannot.
        """

    async def connect(self) -> ShimInfo:
        """Ask the shim who it is, as a sign of life."""

    async def shutdown(self, *, now: bool = False) -> None:
        """Tell the shim to go; with ``now`` even if it has a task. It may not answer any more."""

    async def host(self, request: ShimRequest) -> ShimAddress:
        """Have the process serve one more bundle; may be asked again.

        Raises:
            FailedPrecondition: it is about to end, or there is nothing to adopt.
        """

    async def leave(self, *, now: bool = False) -> None:
        """Have the process serve this task no longer; may be asked again.

        Unless it has to be ``now``, that is once its events are acknowledged.

        Raises:
            FailedPrecondition: it has a container, and it does not have to be now.
            DeadlineExceeded: that does not die.
        """

    async def info(self) -> ProgramInfo:
        """The program that the shim runs."""

    async def reexec(self, program: Sequence[str], generation: int) -> Reexecuted:
        """Have the shim execute ``program`` in place; breaks with Unavailable: ask again.

        Raises:
            InvalidArgument: ``generation`` is neither the present one nor the next.
            FailedPrecondition: the program is no good; the old one goes on.
        """

    async def metrics(self) -> bytes:
        """The shim's page of metrics, in Prometheus' text format."""

    async def attach(self) -> MessageStream:
        """Begin a call of ``theseus.shim.v1.Streams.Attach``; the caller closes it."""

    async def close(self) -> None:
        """Give up the connection. Idempotent; the shim does not notice."""


class ShimConnector(Protocol):
    """Makes a :class:`Shim` of an address. Connects with the first call, not now."""

    def __call__(
        self, *, namespace: str, container_id: str, address: str, way: Way | None = None
    ) -> Shim:
        """A client of the shim of ``container_id`` that listens on ``address`` (``unix://PATH``).

        It uses ``way``, which becomes its own, for as long as that stands.
        """
