"""From a container's record to what the builder of OCI configurations wants to know."""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING, Any

from services.common.errors import InvalidArgument
from services.daemon.containers.record import SHORT_ID_LENGTH, Mount, MountKind
from services.daemon.containers.signals import parse_signal
from services.daemon.networks import network
from services.daemon.networks.ports import normalize_ports
from services.daemon.spec import capabilities
from services.daemon.spec.builder import build_spec
from services.daemon.spec.limits import validate_env, validate_resources, validate_working_dir
from services.daemon.spec.process import arguments
from services.daemon.spec.request import NetworkMode, Overrides, Resources, SpecRequest
from services.daemon.spec.security import parse_security_options
from services.daemon.volumes import mounts as volume_mounts
from services.daemon.volumes.mounts import MountType, clean_target, validate_mounts

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from services.daemon.containers.record import ContainerConfig, ContainerRecord, PortMapping
    from services.daemon.spec.host import HostFacts
    from services.daemon.spec.request import ImageConfig, ResolvedUser
    from services.daemon.volumes.mounts import ResolvedMount

_SIGTERM = 15
_HOSTNAME = re.compile(r"[a-zA-Z0-9]([a-zA-Z0-9.-]{0,62}[a-zA-Z0-9])?")
CGROUP_PARENT = "/theseus"


def network_mode(config: ContainerConfig) -> NetworkMode:
    """Which network a container is in.

    Raises:
        InvalidArgument: there is no such mode.
    """
    try:
        return NetworkMode(config.network_mode or NetworkMode.BRIDGE.value)
    except ValueError:
        raise InvalidArgument(
            f"network {config.network_mode} not found: it is one of none, host and bridge",
            field="network_mode",
        ) from None


def hostname(record: ContainerRecord, host: str) -> str:
    """The name that a container calls itself; ``host`` is this machine's."""
    if record.config.hostname:
        return record.config.hostname
    if network_mode(record.config) is NetworkMode.HOST:
        return host
    return record.id[:SHORT_ID_LENGTH]


def stop_signal(record: ContainerRecord) -> int:
    """The signal that asks a container to stop."""
    wanted = record.config.stop_signal or record.image.config.stop_signal
    return parse_signal(wanted, default=_SIGTERM)


def check(
    config: ContainerConfig, image: ImageConfig, host: HostFacts
) -> tuple[list[str], tuple[str, ...]]:
    """Check everything that can be checked before anything is made.

    Returns:
        Warnings for the user; and what will be executed.

    Raises:
        InvalidArgument: a field that makes no sense.
    """
    warnings = []
    mode = network_mode(config)
    normalize_ports(tuple(_port(port) for port in config.ports))
    if config.ports and mode is NetworkMode.HOST:
        warnings.append("Published ports are discarded when using host network mode")
    if config.hostname and not _HOSTNAME.fullmatch(config.hostname):
        raise InvalidArgument(f"invalid hostname: {config.hostname}", field="hostname")
    parse_signal(config.stop_signal, default=_SIGTERM)
    validate_env(config.env)
    validate_working_dir(config.working_dir)
    validate_mounts(volume_mount(mount) for mount in config.mounts)
    validate_resources(_resources(config), host)
    parse_security_options(config.security_opt)
    capabilities.granted(
        add=config.cap_add,
        drop=config.cap_drop,
        privileged=config.privileged,
        available=host.capabilities,
    )
    if config.resources.memory_bytes and not host.swap_limit:
        warnings.append(
            "Your kernel does not support swap limit capabilities or the cgroup is not mounted. "
            "Memory limited without swap."
        )
    return warnings, arguments(image, _overrides(config))


def all_mounts(config: ContainerConfig, image: ImageConfig) -> tuple[Mount, ...]:
    """The mounts asked for, and an anonymous volume for each other place that the image names."""
    targets = {clean_target(mount.target) for mount in config.mounts}
    implied = [path for path in image.volumes if path and clean_target(path) not in targets]
    return (*config.mounts, *(Mount(MountKind.VOLUME, "", path) for path in implied))


def volume_mount(mount: Mount) -> volume_mounts.Mount:
    """A mount in the words of :mod:`services.daemon.volumes`."""
    return volume_mounts.Mount(
        type=MountType(mount.kind.value),
        source=mount.source,
        target=mount.target,
        read_only=mount.read_only,
        options=mount.options,
        create_source=mount.create_source,
    )


def network_ports(ports: Sequence[PortMapping]) -> tuple[network.PortMapping, ...]:
    """Published ports in the words of :mod:`services.daemon.networks`."""
    return tuple(_port(port) for port in ports)


def specification(
    record: ContainerRecord,
    host: HostFacts,
    *,
    user: ResolvedUser,
    name: str,
    netns_path: str,
    mounts: Sequence[ResolvedMount],
    files: Mapping[str, str],
) -> dict[str, Any]:
    """The OCI configuration of a container. Blocks shortly.

    Args:
        record: of the container.
        host: facts of this machine.
        user: whom it runs as.
        name: its host name.
        netns_path: of the namespace that it joins; empty for one made by the runtime.
        mounts: as resolved.
        files: path in the container -> path on the host.

    Raises:
        InvalidArgument: something that cannot be had.
    """
    config = record.config
    security = parse_security_options(config.security_opt)
    request = SpecRequest(
        image=record.image.config,
        overrides=_overrides(config),
        user=user,
        hostname=name,
        cgroups_path=f"{CGROUP_PARENT}/{record.id}",
        readonly_rootfs=config.read_only,
        network_mode=network_mode(config),
        netns_path=netns_path,
        mounts=tuple(mounts),
        files=files,
        resources=_resources(config),
        privileged=config.privileged,
        cap_add=config.cap_add,
        cap_drop=config.cap_drop,
        no_new_privileges=security.no_new_privileges,
        seccomp=security.seccomp,
    )
    return build_spec(request, host)


def _overrides(config: ContainerConfig) -> Overrides:
    return Overrides(
        entrypoint=config.entrypoint,
        command=config.command,
        env=config.env,
        working_dir=config.working_dir,
        tty=config.tty,
    )


def _resources(config: ContainerConfig) -> Resources:
    return Resources(**dataclasses.asdict(config.resources))


def _port(port: PortMapping) -> network.PortMapping:
    return network.PortMapping(**dataclasses.asdict(port))
