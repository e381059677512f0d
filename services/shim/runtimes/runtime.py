"""What a shim wants of an OCI runtime, and how its failures look.

A runtime is a program with runc's command line; what differs between programs lies behind this
interface. One :class:`Runtime` object serves one container: it carries the container's state root
and log file. Every call runs the program to its end, within a time limit and with its output
bounded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from services.common.errors import FailedPrecondition, Internal, InvalidArgument
from services.common.frozen import frozen

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from typing import Any

COMMAND_NOT_FOUND = "COMMAND_NOT_FOUND"
COMMAND_NOT_EXECUTABLE = "COMMAND_NOT_EXECUTABLE"


@frozen
class RuntimeOptions:
    """Which runtime a container has, and how it is run.

    Attributes:
        binary: name to be looked up in PATH, or absolute path.
        root: directory of the runtime's state.
        systemd_cgroup: let systemd make the cgroup.
        no_pivot_root: enter the root by a move instead of pivot_root(2).
        no_new_keyring: keep the session keyring.
        io_uid: owner of the stdio pipes.
        io_gid: their group.
    """

    binary: str
    root: Path
    systemd_cgroup: bool = False
    no_pivot_root: bool = False
    no_new_keyring: bool = False
    io_uid: int = 0
    io_gid: int = 0


@frozen
class RuntimeStdio:
    """Descriptors that a new process of the container gets; the runtime passes on its own."""

    stdin: int
    stdout: int
    stderr: int


@frozen
class CheckpointRequest:
    """How a checkpoint is taken; the switches are criu's.

    Attributes:
        image: directory for the image, made if it is not there.
        work: criu's, for its log and what it needs meanwhile.
        leave_running: the container goes on afterwards.
        open_tcp: save open TCP connections, instead of failing.
        external_unix_sockets: likewise Unix sockets with an end outside.
        terminal: likewise a terminal.
        file_locks: likewise file locks.
        empty_namespaces: kinds of namespaces whose content is not saved.
        cgroups_mode: ``soft``, ``full``, ``strict``; empty: criu's default.
        parent: image of which only the difference is saved; None: all is.
    """

    image: Path
    work: Path
    leave_running: bool = True
    open_tcp: bool = False
    external_unix_sockets: bool = False
    terminal: bool = False
    file_locks: bool = False
    empty_namespaces: tuple[str, ...] = ()
    cgroups_mode: str = ""
    parent: Path | None = None


class CommandNotFound(InvalidArgument):
    """The container's command does not exist in it: exit code 127 to users."""

    def __init__(self, message: str) -> None:
        super().__init__(message, reason=COMMAND_NOT_FOUND)


class CommandNotExecutable(InvalidArgument):
    """The container's command exists and cannot be executed: exit code 126 to users."""

    def __init__(self, message: str) -> None:
        super().__init__(message, reason=COMMAND_NOT_EXECUTABLE)


class RuntimeMissing(FailedPrecondition):
    """The runtime's program is not there, or cannot be executed."""


class RuntimeFailed(FailedPrecondition):
    """The runtime refused, and said why."""


class RuntimeBroken(Internal):
    """The runtime hung, died, or answered with something that makes no sense."""


class UnknownToRuntime(FailedPrecondition):
    """The runtime knows no such container."""


class Runtime(Protocol):
    """An OCI runtime for one container.

    All calls raise :class:`RuntimeMissing`, :class:`RuntimeFailed`, :class:`RuntimeBroken`.
    """

    name: str

    def prepare(self, bundle: Path, spec: Mapping[str, Any]) -> None:
        """Do for a create what needs no root file system, while that is mounted. Blocks, shortly.

        A plug-in may be without.

        Args:
            bundle: directory with the spec.
            spec: its content.
        """
        ...

    async def create(
        self, *, bundle: Path, pid_file: Path, stdio: RuntimeStdio | None, console: str
    ) -> int:
        """Create the container; returns the pid of its init, which waits to be started.

        Args:
            bundle: directory with the spec and the root file system.
            pid_file: where the runtime is to write the pid.
            stdio: init's streams; None with a terminal.
            console: socket that takes the terminal's master, or empty.

        Raises:
            CommandNotFound: its command does not exist.
            CommandNotExecutable: its command cannot be executed.
        """
        ...

    async def start(self) -> None:
        """Let init run the container's command."""
        ...

    async def let_go(self) -> bool:
        """Do what ``start`` does for a container without hooks, without the program.

        A plug-in may be without.

        Returns:
            False: that cannot be done here; nothing has changed.
        """
        ...

    async def exec(
        self, *, process_file: Path, pid_file: Path, stdio: RuntimeStdio | None, console: str
    ) -> int:
        """Run one more process, described as in the OCI spec; returns its pid. Raises as create."""
        ...

    async def kill(self, signum: int, *, all_processes: bool) -> None:
        """Signal init, or everything in the container."""
        ...

    async def pause(self) -> None:
        """Freeze the container."""
        ...

    async def resume(self) -> None:
        """Let a frozen container go on."""
        ...

    async def update(self, resources_file: Path) -> None:
        """Change limits to those in a file with the spec's resources."""
        ...

    async def delete(self, *, force: bool, hurry: bool = True) -> None:
        """Remove what the runtime keeps of the container; one that it does not know is fine.

        The root file system may be unmounted already, unless the spec has hooks.

        Args:
            force: kill what runs.
            hurry: somebody waits; if not, others go first.
        """
        ...

    async def checkpoint(self, request: CheckpointRequest) -> None:
        """Save the container's state; after a failure it goes on as before.

        Raises:
            Unimplemented: this runtime cannot.
        """
        ...

    async def restore(
        self,
        *,
        bundle: Path,
        pid_file: Path,
        stdio: RuntimeStdio | None,
        console: str,
        image: Path,
        work: Path,
    ) -> int:
        """Make the container out of a saved state; returns the pid of its init, which runs.

        Raises:
            Unimplemented: this runtime cannot.
        """
        ...

    async def version(self) -> str:
        """First line of what the program says about its version."""
        ...
