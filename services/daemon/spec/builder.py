"""Builds one container's OCI runtime configuration (version 1.0.2) from a :class:`SpecRequest`.

Defaults and rules are moby's, so that an image behaves as its author saw it. The version is 1.0.2
because older runtimes refuse any later one; nothing newer is used.

What depends on the machine comes in as :class:`HostFacts`. The file system is looked at only for
device nodes that are asked for and for the propagation of bind mounts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from services.daemon.spec import capabilities as caps
from services.daemon.spec import defaults, devices, seccomp
from services.daemon.spec.limits import validate_resources
from services.daemon.spec.process import arguments, environment, process
from services.daemon.spec.request import NetworkMode

if TYPE_CHECKING:
    from collections.abc import Mapping

    from services.daemon.spec.host import HostFacts
    from services.daemon.spec.request import Resources, SpecRequest
    from services.daemon.volumes.mounts import ResolvedMount

OCI_VERSION = "1.0.2"
_CPU_PERIOD_US = 100_000
_RECURSIVE_READONLY_KERNEL = (5, 12)  # mount_setattr(2)


def build_spec(request: SpecRequest, host: HostFacts) -> dict[str, Any]:
    """The configuration as the JSON object that ``config.json`` holds. Blocks shortly.

    Raises:
        InvalidArgument: limits, capabilities, variables, devices or paths that cannot be had.
    """
    validate_resources(request.resources, host)
    granted = caps.granted(
        add=request.cap_add,
        drop=request.cap_drop,
        privileged=request.privileged,
        available=host.capabilities,
    )
    spec: dict[str, Any] = {
        "ociVersion": OCI_VERSION,
        "process": _process(request, granted),
        "root": {"path": request.rootfs, "readonly": request.readonly_rootfs},
        "hostname": request.hostname,
        "mounts": _mounts(request, host),
        "linux": _linux(request, host, granted),
    }
    if request.annotations:
        spec["annotations"] = dict(request.annotations)
    return spec


def _process(request: SpecRequest, granted: tuple[str, ...]) -> dict[str, Any]:
    image, overrides = request.image, request.overrides
    made = process(
        arguments(image, overrides),
        env=environment(image, overrides, hostname=request.hostname, user=request.user),
        working_dir=overrides.working_dir or image.working_dir,
        user=request.user,
        tty=overrides.tty,
        capabilities=granted,
        no_new_privileges=request.no_new_privileges,
    )
    if request.rlimits:
        made["rlimits"] = [
            {"type": limit.name, "soft": limit.soft, "hard": limit.hard}
            for limit in request.rlimits
        ]
    if request.oom_score_adj is not None:
        made["oomScoreAdj"] = request.oom_score_adj
    return made


def _linux(request: SpecRequest, host: HostFacts, granted: tuple[str, ...]) -> dict[str, Any]:
    nodes, rules = devices.requested(request.devices)
    if request.privileged:
        asked = {node["path"] for node in nodes}
        nodes += [node for node in devices.host_devices() if node["path"] not in asked]
        rules = [{"allow": True, "access": "rwm"}]
    linux: dict[str, Any] = {
        "cgroupsPath": request.cgroups_path,
        "namespaces": _namespaces(request, host),
        "resources": {
            "devices": [*defaults.device_rules(), *rules],
            **_resources(request.resources, host),
        },
        "devices": nodes,
    }
    if request.network_mode is not NetworkMode.HOST:
        # Pings without CAP_NET_RAW, and low ports for every user: both harmless in a namespace.
        linux["sysctl"] = {
            "net.ipv4.ping_group_range": "0 2147483647",
            "net.ipv4.ip_unprivileged_port_start": "0",
        }
    linux.update(_paths(request, host))
    propagation = _root_propagation(request.mounts)
    if propagation:
        linux["rootfsPropagation"] = propagation
    if request.seccomp is not None and not request.privileged:
        linux["seccomp"] = seccomp.render(
            request.seccomp,
            machine=host.machine,
            kernel=host.kernel,
            capabilities=granted,
            x32=host.x32,
        )
    return linux


def _namespaces(request: SpecRequest, host: HostFacts) -> list[dict[str, str]]:
    namespaces = [{"type": kind} for kind in ("mount", "uts", "pid", "ipc")]
    if request.network_mode is not NetworkMode.HOST:
        network = {"type": "network"}
        if request.netns_path:
            network["path"] = request.netns_path
        namespaces.append(network)
    if host.unified_cgroups:
        namespaces.append({"type": "cgroup"})
    return namespaces


def _resources(resources: Resources, host: HostFacts) -> dict[str, Any]:
    made: dict[str, Any] = {}
    if resources.memory_bytes:
        made["memory"] = {"limit": resources.memory_bytes}
        if host.swap_limit:
            # Memory and swap together: as much swap as memory, moby's default.
            made["memory"]["swap"] = resources.memory_bytes * 2
    cpu: dict[str, int] = {}
    if resources.cpu_shares:
        cpu["shares"] = resources.cpu_shares
    if resources.nano_cpus:
        cpu["period"] = _CPU_PERIOD_US
        cpu["quota"] = resources.nano_cpus * _CPU_PERIOD_US // 1_000_000_000
    if cpu:
        made["cpu"] = cpu
    if resources.pids_limit:
        made["pids"] = {"limit": resources.pids_limit}
    return made


def _paths(request: SpecRequest, host: HostFacts) -> dict[str, list[str]]:
    masked, readonly = request.masked_paths, request.readonly_paths
    if masked is None:
        masked = () if request.privileged else (*defaults.MASKED_PATHS, *host.thermal_paths)
    if readonly is None:
        readonly = () if request.privileged else defaults.READONLY_PATHS
    return {"maskedPaths": list(masked), "readonlyPaths": list(readonly)}


def _mounts(request: SpecRequest, host: HostFacts) -> list[dict[str, Any]]:
    targets = {mount.target for mount in request.mounts}
    made = [
        mount
        for mount in defaults.mounts(shm_size_bytes=request.shm_size_bytes)
        if mount["destination"] not in targets
        and not ("/dev" in targets and mount["destination"].startswith("/dev/"))
    ]
    if request.privileged:
        for mount in made:
            if mount["type"] in ("sysfs", "cgroup"):
                mount["options"].remove("ro")
    if request.readonly_rootfs:
        _make_readonly(made)
    recursive = host.kernel >= _RECURSIVE_READONLY_KERNEL
    asked = _file_mounts(request.files, targets)
    asked += [_mount(mount, recursive_readonly=recursive) for mount in request.mounts]
    # Outer mounts before inner ones, whatever the order in which they were asked for.
    return made + sorted(asked, key=lambda mount: str(mount["destination"]).count("/"))


def _make_readonly(mounts: list[dict[str, Any]]) -> None:
    for mount in mounts:
        writable = mount["destination"] in defaults.WRITABLE_ON_READONLY_ROOT
        if not writable and "ro" not in mount["options"]:
            mount["options"].append("ro")


def _file_mounts(files: Mapping[str, str], targets: set[str]) -> list[dict[str, Any]]:
    return [
        {
            "destination": target,
            "type": "bind",
            "source": source,
            "options": ["rbind", "rprivate"],
        }
        for target, source in files.items()
        if target not in targets
    ]


def _mount(mount: ResolvedMount, *, recursive_readonly: bool) -> dict[str, Any]:
    options = list(mount.options)
    if mount.read_only:
        options.append("rro" if mount.is_bind and recursive_readonly else "ro")
    return {
        "destination": mount.target,
        "type": "bind" if mount.is_bind else "tmpfs",
        "source": mount.source,
        "options": options,
    }


def _root_propagation(mounts: tuple[ResolvedMount, ...]) -> str:
    """A shared mount needs a shared root above it, a slave one at least a slave."""
    words = {option for mount in mounts for option in mount.options}
    if words & {"shared", "rshared"}:
        return "shared"
    return "rslave" if words & {"slave", "rslave"} else ""
