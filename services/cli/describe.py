"""Containers and images as the JSON that docker's ``inspect`` prints: same keys, same shapes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from protos.theseus.engine.v1 import containers_pb2 as pb
from services.cli.names import familiar, split

if TYPE_CHECKING:
    from collections.abc import Iterable

    from google.protobuf.timestamp_pb2 import Timestamp

    from protos.theseus.engine.v1 import images_pb2

_NEVER = "0001-01-01T00:00:00Z"
_STATES = {
    pb.CONTAINER_STATE_CREATED: "created",
    pb.CONTAINER_STATE_RUNNING: "running",
    pb.CONTAINER_STATE_PAUSED: "paused",
    pb.CONTAINER_STATE_EXITED: "exited",
    pb.CONTAINER_STATE_REMOVING: "removing",
}
_MOUNT_TYPES = {
    pb.Mount.TYPE_BIND: "bind",
    pb.Mount.TYPE_VOLUME: "volume",
    pb.Mount.TYPE_TMPFS: "tmpfs",
}


def container(found: pb.Container) -> dict[str, Any]:
    """A container."""
    path, *arguments = found.args or [""]
    return {
        "Id": found.id,
        "Created": _time(found.created_at),
        "Path": path,
        "Args": arguments,
        "State": _state(found),
        "Image": found.image_id,
        "Name": f"/{found.name}",
        "LogPath": found.log_path,
        "HostConfig": _host_config(found.config),
        "Mounts": [_mount(mount) for mount in found.mounts],
        "Config": _config(found.config),
        "NetworkSettings": _network(found),
    }


def image(found: images_pb2.Image) -> dict[str, Any]:
    """An image."""
    config = json.loads(found.config or b"{}")
    names = [split(familiar(reference)) for reference in found.references]
    system, _, architecture = found.platform.partition("/")
    return {
        "Id": found.id,
        "RepoTags": [f"{repository}:{tag}" for repository, tag, _ in names if tag],
        "RepoDigests": sorted(
            {f"{repository}@{digest or found.digest}" for repository, _, digest in names}
        ),
        "Created": _time(found.created_at),
        "Architecture": architecture.partition("/")[0],
        "Variant": architecture.partition("/")[2],
        "Os": system,
        "Size": found.unpacked_bytes or found.size_bytes,
        "Config": config.get("config", {}),
        "RootFS": {
            "Type": "layers",
            "Layers": config.get("rootfs", {}).get("diff_ids", []),
        },
    }


def _state(found: pb.Container) -> dict[str, Any]:
    running = found.state in (pb.CONTAINER_STATE_RUNNING, pb.CONTAINER_STATE_PAUSED)
    return {
        "Status": _STATES.get(found.state, "unknown"),
        "Running": running,
        "Paused": found.state == pb.CONTAINER_STATE_PAUSED,
        "OOMKilled": found.exit.oom_killed,
        "Pid": found.pid,
        # A status that is lost is not made up.
        "ExitCode": None if found.exit.lost else found.exit.code,
        "Error": found.exit.error,
        "StartedAt": _time(found.started_at),
        "FinishedAt": _time(found.exit.finished_at),
    }


def _host_config(config: pb.ContainerConfig) -> dict[str, Any]:
    return {
        "NetworkMode": config.network_mode or "bridge",
        "PortBindings": _bindings(config.ports),
        "AutoRemove": config.auto_remove,
        "Privileged": config.privileged,
        "ReadonlyRootfs": config.read_only,
        "CapAdd": list(config.cap_add),
        "CapDrop": list(config.cap_drop),
        "SecurityOpt": list(config.security_opt),
        "Runtime": config.runtime,
        "Memory": config.resources.memory_bytes,
        "NanoCpus": config.resources.nano_cpus,
        "CpuShares": config.resources.cpu_shares,
        "PidsLimit": config.resources.pids_limit,
    }


def _config(config: pb.ContainerConfig) -> dict[str, Any]:
    return {
        "Hostname": config.hostname,
        "User": config.user,
        "Tty": config.tty,
        "OpenStdin": config.open_stdin,
        "Env": list(config.env),
        "Cmd": list(config.command),
        "Entrypoint": list(config.entrypoint) or None,
        "Image": config.image,
        "WorkingDir": config.working_dir,
        "Labels": dict(config.labels),
        "StopSignal": config.stop_signal,
    }


def _network(found: pb.Container) -> dict[str, Any]:
    networks = {
        endpoint.network: {
            "IPAddress": endpoint.ip_address,
            "IPPrefixLen": endpoint.prefix_length,
            "Gateway": endpoint.gateway,
            "MacAddress": endpoint.mac_address,
        }
        for endpoint in found.networks
    }
    first = next(iter(networks.values()), {})
    return {
        "IPAddress": first.get("IPAddress", ""),
        "IPPrefixLen": first.get("IPPrefixLen", 0),
        "Gateway": first.get("Gateway", ""),
        "MacAddress": first.get("MacAddress", ""),
        "Ports": _bindings(found.ports),
        "Networks": networks,
    }


def _bindings(mappings: Iterable[pb.PortMapping]) -> dict[str, list[dict[str, str]]]:
    result: dict[str, list[dict[str, str]]] = {}
    for mapping in mappings:
        key = f"{mapping.container_port}/{mapping.protocol or 'tcp'}"
        port = str(mapping.host_port or "")
        result.setdefault(key, []).append(
            {"HostIp": mapping.host_ip or "0.0.0.0", "HostPort": port}
        )
    return result


def _mount(mount: pb.Mount) -> dict[str, Any]:
    return {
        "Type": _MOUNT_TYPES.get(mount.type, "bind"),
        "Source": mount.source,
        "Destination": mount.target,
        "Mode": ",".join(mount.options),
        "RW": not mount.read_only,
    }


def _time(moment: Timestamp) -> str:
    return moment.ToJsonString() if moment.ToNanoseconds() else _NEVER
