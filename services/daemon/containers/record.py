"""What the daemon knows of a container: frozen data, and how far along its life it is.

A record is created, changed and removed only through
:class:`services.daemon.containers.store.ContainerStore`.
"""

from __future__ import annotations

import enum
from dataclasses import field
from typing import TYPE_CHECKING, NewType

from services.common.frozen import frozen

if TYPE_CHECKING:
    from collections.abc import Mapping

    from services.daemon.images.image import RunImage

ContainerId = NewType("ContainerId", str)
ExecId = NewType("ExecId", str)

SHORT_ID_LENGTH = 12


class State(enum.StrEnum):
    """Where a container is in its life; see :mod:`services.daemon.containers.states`.

    ``creating`` and ``starting`` exist while such a call runs, and after a crash in it until the
    daemon has cleaned up.
    """

    CREATING = "creating"
    CREATED = "created"
    STARTING = "starting"
    RUNNING = "running"
    PAUSED = "paused"
    EXITED = "exited"
    REMOVING = "removing"


LIVE_STATES = frozenset({State.STARTING, State.RUNNING, State.PAUSED})
"""States in which a process of the container may exist."""


class MountKind(enum.StrEnum):
    """What is mounted."""

    BIND = "bind"
    VOLUME = "volume"
    TMPFS = "tmpfs"


@frozen
class Mount:
    """A mount as asked for; as resolved, a volume's ``source`` is its name.

    Attributes:
        directory: of a resolved volume on the host; empty before.
        anonymous: the volume was made for this container and goes with it, when asked.
    """

    kind: MountKind
    source: str
    target: str
    read_only: bool = False
    options: tuple[str, ...] = ()
    create_source: bool = False
    directory: str = ""
    anonymous: bool = False


@frozen
class PortMapping:
    """A published port. ``host_port`` 0 lets the engine pick one."""

    container_port: int
    host_port: int = 0
    host_ip: str = ""
    protocol: str = "tcp"


@frozen
class Resources:
    """Limits; 0 means none."""

    memory_bytes: int = 0
    nano_cpus: int = 0
    pids_limit: int = 0
    cpu_shares: int = 0


@frozen
class ContainerConfig:
    """What the user asked for. Empty takes the image's value, then the engine's default.

    Attributes:
        entrypoint: None takes the image's.
        stop_timeout_s: between the stop signal and SIGKILL; negative waits for ever.
    """

    image: str
    command: tuple[str, ...] = ()
    entrypoint: tuple[str, ...] | None = None
    env: tuple[str, ...] = ()
    working_dir: str = ""
    user: str = ""
    tty: bool = False
    open_stdin: bool = False
    hostname: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    mounts: tuple[Mount, ...] = ()
    network_mode: str = ""
    ports: tuple[PortMapping, ...] = ()
    resources: Resources = Resources()
    auto_remove: bool = False
    stop_signal: str = ""
    stop_timeout_s: float = 10.0
    read_only: bool = False
    runtime: str = ""
    privileged: bool = False
    cap_add: tuple[str, ...] = ()
    cap_drop: tuple[str, ...] = ()
    security_opt: tuple[str, ...] = ()


@frozen
class ExitStatus:
    """How a process ended.

    Attributes:
        code: 0 to 255; 128 + signal when a signal ended it.
        lost: it cannot be known; ``code`` means nothing then, and ``error`` says why.
        error: why it could not start or was lost; empty otherwise.
    """

    code: int
    finished_at_ns: int
    oom_killed: bool = False
    lost: bool = False
    error: str = ""


@frozen
class Endpoint:
    """A container's place in a network."""

    network: str
    ip_address: str = ""
    prefix_length: int = 0
    gateway: str = ""
    mac_address: str = ""


@frozen
class ContainerRecord:
    """One container.

    Attributes:
        image: what its image said when it was made; nothing is looked up again later.
        args: entrypoint and arguments that run.
        revision: grows with every change; a reader keeps the newest.
        runs: starts so far, and ``exits`` their ends so far, failed starts included.
        unclean: something of the last run may be left below: task, network, namespace.
        starting_at_ns: when the last start began; an exit before that belongs to an earlier run.
        pid: of init; 0 when none runs, or it is not known yet.
        oom_killed: the kernel killed something of the current run for lack of memory.
        early_exit: how init ended while the start was still under way; it counts if that succeeds.
        exit: of the last run that ended; None before the first.
        ports: as published by the last start, host ports filled in.
        remove_volumes: its removal, once begun, takes its anonymous volumes too.
    """

    id: ContainerId
    name: str
    config: ContainerConfig
    image: RunImage
    args: tuple[str, ...]
    state: State
    created_at_ns: int
    revision: int = 0
    runs: int = 0
    exits: int = 0
    unclean: bool = False
    starting_at_ns: int = 0
    started_at_ns: int = 0
    pid: int = 0
    oom_killed: bool = False
    early_exit: ExitStatus | None = None
    exit: ExitStatus | None = None
    mounts: tuple[Mount, ...] = ()
    endpoints: tuple[Endpoint, ...] = ()
    ports: tuple[PortMapping, ...] = ()
    remove_volumes: bool = False

    @property
    def live(self) -> bool:
        """Whether a process of it may exist."""
        return self.state in LIVE_STATES


@frozen
class Tombstone:
    """What is kept of a removed container for those who still wait for it."""

    id: ContainerId
    name: str
    exit: ExitStatus | None
    removed_at_ns: int


@frozen
class ExecConfig:
    """A further process, as asked for. Empty takes the container's value."""

    command: tuple[str, ...]
    env: tuple[str, ...] = ()
    working_dir: str = ""
    user: str = ""
    tty: bool = False
    open_stdin: bool = False
    privileged: bool = False
    detach: bool = False
    width: int = 0
    height: int = 0


class ExecState(enum.StrEnum):
    """Where an exec session is in its life."""

    CREATED = "created"
    RUNNING = "running"
    EXITED = "exited"


@frozen
class ExecRecord:
    """One exec session.

    Attributes:
        run: the run of the container (``ContainerRecord.runs``) that it belongs to.
        deleted: containerd has forgotten the process.
    """

    id: ExecId
    container_id: ContainerId
    run: int
    config: ExecConfig
    state: ExecState = ExecState.CREATED
    pid: int = 0
    exit: ExitStatus | None = None
    deleted: bool = False
    revision: int = 0
