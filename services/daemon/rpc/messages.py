"""Between the messages of ``theseus.engine.v1`` and the data of the domain."""

from __future__ import annotations

from typing import TYPE_CHECKING

from google.protobuf import duration_pb2, timestamp_pb2

from protos.theseus.engine.v1 import containers_pb2 as pb
from services.common.errors import InvalidArgument
from services.daemon.containers.record import (
    ContainerConfig,
    ContainerRecord,
    ExitStatus,
    Mount,
    MountKind,
    PortMapping,
    Resources,
    State,
)

if TYPE_CHECKING:
    from pathlib import Path

_STOP_TIMEOUT_S = 10.0
_KINDS = {
    pb.Mount.TYPE_BIND: MountKind.BIND,
    pb.Mount.TYPE_VOLUME: MountKind.VOLUME,
    pb.Mount.TYPE_TMPFS: MountKind.TMPFS,
}
_TYPES = {kind: number for number, kind in _KINDS.items()}
_STATES = {
    State.CREATING: pb.CONTAINER_STATE_CREATED,
    State.CREATED: pb.CONTAINER_STATE_CREATED,
    State.RUNNING: pb.CONTAINER_STATE_RUNNING,
    State.PAUSED: pb.CONTAINER_STATE_PAUSED,
    State.EXITED: pb.CONTAINER_STATE_EXITED,
    State.REMOVING: pb.CONTAINER_STATE_REMOVING,
}


def config_from_pb(config: pb.ContainerConfig) -> ContainerConfig:
    """What the user asked for.

    Raises:
        InvalidArgument: a value out of its range.
    """
    if not config.image:
        raise InvalidArgument("an image is needed, none was given", field="config.image")
    return ContainerConfig(
        image=config.image,
        command=tuple(config.command),
        entrypoint=tuple(config.entrypoint) or None,
        env=tuple(config.env),
        working_dir=config.working_dir,
        user=config.user,
        tty=config.tty,
        open_stdin=config.open_stdin,
        hostname=config.hostname,
        labels=dict(config.labels),
        mounts=tuple(_mount_from_pb(mount) for mount in config.mounts),
        network_mode=config.network_mode,
        ports=tuple(_port_from_pb(port) for port in config.ports),
        resources=_resources_from_pb(config.resources),
        auto_remove=config.auto_remove,
        stop_signal=config.stop_signal,
        stop_timeout_s=(
            duration_s(config.stop_timeout) if config.HasField("stop_timeout") else _STOP_TIMEOUT_S
        ),
        read_only=config.read_only,
        runtime=config.runtime,
        privileged=config.privileged,
        cap_add=tuple(config.cap_add),
        cap_drop=tuple(config.cap_drop),
        security_opt=tuple(config.security_opt),
    )


def container_to_pb(record: ContainerRecord, *, log_path: Path) -> pb.Container:
    """A container as its users see it."""
    return pb.Container(
        id=record.id,
        name=record.name,
        config=_config_to_pb(record.config),
        image_id=record.image.id,
        state=_state(record),
        pid=record.pid,
        exit=None if record.exit is None or record.live else exit_to_pb(record.exit),
        created_at=timestamp(record.created_at_ns),
        started_at=timestamp(record.started_at_ns),
        args=record.args,
        networks=[
            pb.NetworkEndpoint(
                network=endpoint.network,
                ip_address=endpoint.ip_address,
                prefix_length=endpoint.prefix_length,
                gateway=endpoint.gateway,
                mac_address=endpoint.mac_address,
            )
            for endpoint in record.endpoints
        ],
        ports=[_port_to_pb(port) for port in record.ports],
        log_path=str(log_path),
        mounts=[_mount_to_pb(mount) for mount in record.mounts],
    )


def exit_to_pb(status: ExitStatus) -> pb.ExitStatus:
    """How a process ended."""
    return pb.ExitStatus(
        code=status.code,
        oom_killed=status.oom_killed,
        finished_at=timestamp(status.finished_at_ns),
        lost=status.lost,
        error=status.error,
    )


def timestamp(time_ns: int) -> timestamp_pb2.Timestamp | None:
    """A point in time; None for 0, which stands for none."""
    if not time_ns:
        return None
    message = timestamp_pb2.Timestamp()
    message.FromNanoseconds(time_ns)
    return message


def duration_s(message: duration_pb2.Duration) -> float:
    """A duration in seconds."""
    return message.ToNanoseconds() / 1e9


def _state(record: ContainerRecord) -> pb.ContainerState.ValueType:
    if record.state is State.STARTING:  # what it was before, until it runs
        return pb.CONTAINER_STATE_EXITED if record.exits else pb.CONTAINER_STATE_CREATED
    return _STATES[record.state]


def _mount_from_pb(mount: pb.Mount) -> Mount:
    if mount.type not in _KINDS:
        raise InvalidArgument(
            f"mount of '{mount.target}' has no known type: it is bind, volume or tmpfs",
            field="config.mounts",
        )
    return Mount(
        kind=_KINDS[mount.type],
        source=mount.source,
        target=mount.target,
        read_only=mount.read_only,
        options=tuple(mount.options),
        create_source=mount.create_source,
    )


def _mount_to_pb(mount: Mount) -> pb.Mount:
    return pb.Mount(
        type=_TYPES[mount.kind],
        source=mount.directory or mount.source,
        target=mount.target,
        read_only=mount.read_only,
        options=mount.options,
        create_source=mount.create_source,
    )


def _port_from_pb(port: pb.PortMapping) -> PortMapping:
    return PortMapping(
        container_port=port.container_port,
        host_port=port.host_port,
        host_ip=port.host_ip,
        protocol=port.protocol or "tcp",
    )


def _port_to_pb(port: PortMapping) -> pb.PortMapping:
    return pb.PortMapping(
        host_ip=port.host_ip,
        host_port=port.host_port,
        container_port=port.container_port,
        protocol=port.protocol,
    )


def _resources_from_pb(resources: pb.Resources) -> Resources:
    for name in ("memory_bytes", "nano_cpus", "pids_limit"):
        if getattr(resources, name) < 0:
            raise InvalidArgument(
                f"limit {name} is negative: leave it out for no limit",
                field=f"config.resources.{name}",
            )
    return Resources(
        memory_bytes=resources.memory_bytes,
        nano_cpus=resources.nano_cpus,
        pids_limit=resources.pids_limit,
        cpu_shares=resources.cpu_shares,
    )


def _config_to_pb(config: ContainerConfig) -> pb.ContainerConfig:
    stop_timeout = duration_pb2.Duration()
    stop_timeout.FromNanoseconds(int(config.stop_timeout_s * 1e9))
    return pb.ContainerConfig(
        image=config.image,
        command=config.command,
        entrypoint=config.entrypoint or (),
        env=config.env,
        working_dir=config.working_dir,
        user=config.user,
        tty=config.tty,
        open_stdin=config.open_stdin,
        hostname=config.hostname,
        labels=config.labels,
        mounts=[_mount_to_pb(mount) for mount in config.mounts],
        network_mode=config.network_mode,
        ports=[_port_to_pb(port) for port in config.ports],
        resources=pb.Resources(
            memory_bytes=config.resources.memory_bytes,
            nano_cpus=config.resources.nano_cpus,
            pids_limit=config.resources.pids_limit,
            cpu_shares=config.resources.cpu_shares,
        ),
        auto_remove=config.auto_remove,
        stop_signal=config.stop_signal,
        stop_timeout=stop_timeout,
        read_only=config.read_only,
        runtime=config.runtime,
        privileged=config.privileged,
        cap_add=config.cap_add,
        cap_drop=config.cap_drop,
        security_opt=config.security_opt,
    )
