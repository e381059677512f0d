"""What containers need from the tier below: its interfaces, and the data that goes over them.

The adapters in :mod:`services.daemon.clients` implement them on containerd. All methods raise the
classes of :mod:`services.common.errors`: ``Unavailable`` when containerd cannot be reached.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Any, Protocol

from services.common.frozen import frozen

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence


@frozen
class RootMount:
    """A mount of a snapshot, as containerd describes it."""

    type: str
    source: str
    target: str = ""
    options: tuple[str, ...] = ()


@frozen
class Stdio:
    """Where a process' standard streams go: empty is /dev/null, else a path or URI."""

    stdin: str = ""
    stdout: str = ""
    stderr: str = ""
    terminal: bool = False


class TaskStatus(enum.StrEnum):
    """State of a process below."""

    UNKNOWN = "unknown"
    CREATED = "created"
    RUNNING = "running"
    STOPPED = "stopped"
    PAUSED = "paused"


@frozen
class TaskProcess:
    """A process as containerd knows it; the exit is meaningful once it has stopped."""

    pid: int
    status: TaskStatus
    exit_code: int = 0
    exited_at_ns: int = 0


@frozen
class NewContainer:
    """What containerd is told of a container.

    Attributes:
        image: its name, for people.
        spec: OCI configuration.
        snapshotter: has the snapshot with the container's id as key.
        runtime: path of the OCI runtime's program.
    """

    id: str
    image: str
    spec: Mapping[str, Any]
    snapshotter: str
    labels: Mapping[str, str]
    runtime: str


class RuntimeContainers(Protocol):
    """containerd's records of containers: what a task is made from."""

    async def put(self, container: NewContainer) -> None:
        """Record a container, which has no task; one of the same id is replaced."""

    async def delete(self, container_id: str) -> None:
        """Forget a container; one that is not there is no error."""

    async def spec(self, container_id: str) -> dict[str, Any]:
        """The OCI configuration that was recorded.

        Raises:
            NotFound: there is no such container.
        """


class Snapshots(Protocol):
    """Root file systems."""

    async def prepare(self, key: str, parent: str) -> list[RootMount]:
        """Make a writable snapshot on a committed one, or on nothing when ``parent`` is empty.

        It is kept until it is removed, whether or not anything refers to it. One that is there
        already is taken as it is.

        Raises:
            NotFound: the parent is not there.
        """

    async def mounts(self, key: str) -> list[RootMount]:
        """How to mount a snapshot."""

    async def remove(self, key: str) -> None:
        """Remove a snapshot; one that is not there is no error."""

    async def usage(self, key: str) -> int:
        """Bytes that a snapshot takes by itself; 0 when it is not there."""


class Tasks(Protocol):
    """Processes. ``exec_id`` empty means init."""

    async def create(
        self, container_id: str, *, rootfs: Sequence[RootMount], stdio: Stdio, runtime: str
    ) -> int:
        """Make init, not started yet; returns its pid. A task left by a lost answer is taken.

        Raises:
            InvalidArgument: with the reason COMMAND_NOT_FOUND or COMMAND_NOT_EXECUTABLE.
        """

    async def run(
        self, container: NewContainer, *, rootfs: Sequence[RootMount], stdio: Stdio
    ) -> int:
        """Record a container, make its init and start it in one call; returns its pid.

        Raises:
            Unimplemented: containerd is of a version that cannot.
            TheseusError: as :meth:`RuntimeContainers.put`, :meth:`create` and :meth:`start`.
        """

    async def start(self, container_id: str, exec_id: str = "") -> int:
        """Start a process that was made; returns its pid. Raises as :meth:`create`."""

    async def exec(
        self, container_id: str, exec_id: str, *, process: Mapping[str, Any], stdio: Stdio
    ) -> None:
        """Make a further process, not started yet."""

    async def kill(self, container_id: str, signal: int, exec_id: str = "") -> None:
        """Send a signal.

        Raises:
            NotFound: the process has ended, or never was.
        """

    async def resume(self, container_id: str) -> None:
        """Thaw a task that is paused."""

    async def get(self, container_id: str, exec_id: str = "") -> TaskProcess:
        """A process' state.

        Raises:
            NotFound: there is none.
        """

    async def all(self) -> Mapping[str, TaskProcess]:
        """State of every container's init by the container's id, as far as it is known now."""

    async def wait_end(self, container_id: str, exec_id: str = "", *, timeout_s: float) -> None:
        """Wait until a process has stopped.

        Raises:
            DeadlineExceeded: it has not, in that time.
            TheseusError: how it ended cannot be known; the message says why.
        """

    async def resize(self, container_id: str, width: int, height: int, exec_id: str = "") -> None:
        """Set the size of a terminal, in characters."""

    async def delete(self, container_id: str, exec_id: str = "") -> None:
        """Forget a process that has stopped; one that is not there is no error."""


class EventKind(enum.Enum):
    """What the daemon takes from the journal."""

    EXIT = enum.auto()
    LOST = enum.auto()
    OOM = enum.auto()
    PAUSED = enum.auto()
    RESUMED = enum.auto()
    OTHER = enum.auto()


@frozen
class RuntimeEvent:
    """One event of the journal.

    Attributes:
        next_seq: where to read on after it.
        exec_id: empty for init.
        timestamp_ns: of the event; of an exit, ``exited_at_ns`` counts.
    """

    next_seq: int
    kind: EventKind
    container_id: str = ""
    exec_id: str = ""
    pid: int = 0
    exit_code: int = 0
    exited_at_ns: int = 0
    timestamp_ns: int = 0


class EventJournal(Protocol):
    """containerd's journal of events, of our namespace."""

    async def end(self) -> int:
        """Sequence number that the next event will have."""

    def read(self, from_seq: int, *, follow: bool) -> AsyncIterator[RuntimeEvent]:
        """Events from a sequence number on; with ``follow`` those to come, too.

        Raises:
            OutOfRange: that part is gone.
            Unavailable: containerd went away: read on from the last ``next_seq``.
        """


class StreamKind(enum.Enum):
    """Which of a process' streams."""

    STDOUT = 1
    STDERR = 2


@frozen
class NewProcess:
    """A further process that is to be made and started: what :meth:`Tasks.exec` takes."""

    process: Mapping[str, Any]
    stdio: Stdio


@frozen
class AttachTarget:
    """Which process, and what of its streams.

    Attributes:
        offset: first byte of output wanted.
        from_end: only what comes from now on.
        exit: ``Finished`` waits for the process' end, too, and says how that was.
        new: start this one first, unless that was done.
    """

    container_id: str
    exec_id: str = ""
    offset: int = 0
    from_end: bool = False
    output: bool = True
    input: bool = False
    exit: bool = False
    new: NewProcess | None = None


@frozen
class Input:
    """Bytes for standard input; ``offset`` of the first in the whole input."""

    offset: int
    data: bytes


@frozen
class CloseInput:
    """Standard input ends."""


@frozen
class Resize:
    """The terminal has a new size."""

    width: int
    height: int


@frozen
class Started:
    """Coupled: input goes on at ``input_offset``, output at ``offset``; pid 0: not known."""

    input_offset: int
    terminal: bool
    offset: int
    pid: int = 0


@frozen
class Output:
    """Bytes that the process wrote; ``offset`` of the first in the whole output."""

    offset: int
    stream: StreamKind
    data: bytes


@frozen
class Gap:
    """Output that cannot be had any more: [from_offset, to_offset)."""

    from_offset: int
    to_offset: int


@frozen
class ProcessEnd:
    """How a process ended."""

    exit_code: int
    exited_at_ns: int


@frozen
class Finished:
    """The output is complete; ``offset`` is its length, ``end`` that of the process, if told."""

    offset: int
    end: ProcessEnd | None = None


@frozen
class Forgotten:
    """The process is deleted."""


AttachInput = Input | CloseInput | Resize
AttachOutput = Started | Output | Gap | Finished | Forgotten


class Streams(Protocol):
    """Standard streams of running processes."""

    def attach(
        self, target: AttachTarget, inputs: AsyncGenerator[AttachInput, None]
    ) -> AsyncGenerator[AttachOutput, None]:
        """Couple with a process; ends after ``Finished``.

        Who goes on after a ``Finished`` that tells the process' end has it deleted, and is told.

        Raises:
            Unavailable: containerd or the shim went away: attach again at the next offset.
            NotFound: there is no such process any more; or it was to be started, and the shim is
                of a version that cannot do that here (the resource is the exec then).
            FailedPrecondition: its input cannot be had.
            InvalidArgument: it cannot be started, as :meth:`Tasks.create`.
        """
