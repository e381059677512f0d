"""What a container's OCI configuration is built from: plain facts, nothing looked up any more.

Names are resolved before: the user by :func:`services.daemon.spec.users.resolve_user`, volumes and
bind sources by :mod:`services.daemon.volumes`, the network namespace by
:mod:`services.daemon.networks`.
"""

from __future__ import annotations

from dataclasses import field
from enum import Enum
from typing import TYPE_CHECKING

from services.common.frozen import frozen

if TYPE_CHECKING:
    from collections.abc import Mapping

    from services.daemon.spec.seccomp import Profile
    from services.daemon.volumes.mounts import ResolvedMount


class NetworkMode(Enum):
    """Which network namespace a container runs in."""

    BRIDGE = "bridge"
    HOST = "host"
    NONE = "none"


@frozen
class ImageConfig:
    """The part of an image's configuration that says how it is run.

    Attributes:
        env: NAME=VALUE, in the image's order.
        exposed_ports: ``port/protocol``.
        volumes: absolute paths that want an anonymous volume.
        stop_signal: name or number; empty for SIGTERM.
    """

    env: tuple[str, ...] = ()
    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    working_dir: str = ""
    user: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    exposed_ports: tuple[str, ...] = ()
    volumes: tuple[str, ...] = ()
    stop_signal: str = ""


@frozen
class Overrides:
    """What the user asked for instead of the image's values; empty takes the image's.

    Attributes:
        entrypoint: None takes the image's; a tuple replaces it and drops the image's command, and
            the empty tuple or a single empty string stands for no entrypoint.
        env: NAME=VALUE adds or replaces; NAME alone removes.
    """

    entrypoint: tuple[str, ...] | None = None
    command: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    working_dir: str = ""
    tty: bool = False


@frozen
class ResolvedUser:
    """Numbers of the user that the process runs as.

    Attributes:
        additional_gids: supplementary groups, without ``gid`` itself.
        home: for the environment variable HOME.
    """

    uid: int = 0
    gid: int = 0
    additional_gids: tuple[int, ...] = ()
    home: str = "/root"


@frozen
class Resources:
    """Limits; 0 means none.

    Attributes:
        nano_cpus: processors, in 10^-9.
        cpu_shares: relative weight; 0 leaves the kernel's default of 1024.
    """

    memory_bytes: int = 0
    nano_cpus: int = 0
    pids_limit: int = 0
    cpu_shares: int = 0


@frozen
class Device:
    """A device node of the host, or a directory of them, to be had in the container.

    Attributes:
        permissions: letters out of ``rwm``.
    """

    host_path: str
    container_path: str
    permissions: str = "rwm"


@frozen
class Rlimit:
    """One resource limit of the process; ``name`` as in ``RLIMIT_NOFILE``."""

    name: str
    soft: int
    hard: int


@frozen
class SpecRequest:
    """Everything that one configuration depends on, but for the host's own facts.

    Attributes:
        rootfs: absolute, or relative to the bundle.
        netns_path: of the namespace to join (mode bridge); empty makes the runtime create one.
        files: path in the container -> file of the host bound there (resolv.conf, hosts, hostname).
        seccomp: None for no filter at all.
        masked_paths: None for the defaults; likewise ``readonly_paths``.
        oom_score_adj: None leaves what the runtime inherits.
    """

    image: ImageConfig
    overrides: Overrides
    user: ResolvedUser
    hostname: str
    cgroups_path: str
    rootfs: str = "rootfs"
    readonly_rootfs: bool = False
    network_mode: NetworkMode = NetworkMode.BRIDGE
    netns_path: str = ""
    mounts: tuple[ResolvedMount, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    resources: Resources = Resources()
    privileged: bool = False
    cap_add: tuple[str, ...] = ()
    cap_drop: tuple[str, ...] = ()
    no_new_privileges: bool = False
    seccomp: Profile | None = None
    masked_paths: tuple[str, ...] | None = None
    readonly_paths: tuple[str, ...] | None = None
    devices: tuple[Device, ...] = ()
    rlimits: tuple[Rlimit, ...] = ()
    oom_score_adj: int | None = None
    shm_size_bytes: int = 64 * 1024 * 1024
    annotations: Mapping[str, str] = field(default_factory=dict)
