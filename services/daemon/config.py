"""The daemon's configuration: one frozen dataclass, made from the command line."""

from __future__ import annotations

import argparse
import ipaddress
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from services.common import VERSION, log
from services.common.errors import InvalidArgument
from services.common.frozen import frozen

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_RUNTIMES = ("runc", "crun")


@frozen
class Config:
    """Everything that can be configured.

    Attributes:
        root: records, volumes, logs; survives reboots.
        state: sockets and network namespaces; gone with a reboot.
        address: the socket served.
        containerd: the socket of containerd.
        namespace: containerd's namespace of all containers and images.
        metrics_address: ``unix:PATH`` or ``HOST:PORT``; empty: none.
        bridge_name: of the default bridge.
        bridge_subnet: the bridge's own address, with the length of its subnet's prefix.
        default_runtime: a key of ``runtimes``.
        runtimes: name -> path of the OCI runtime's program.
        snapshotter: containerd's snapshotter for images and containers.
        log_level: one of services.common.log.LEVELS.
        return_grace_s: after a start, how long clients that were attached to containers which have
            ended meanwhile have to come back for the rest of the output.
        lock_timeout_s: how long to wait for another daemon to leave the root.
        disk_reserve_bytes: room that is kept for records on a full disk.
    """

    root: Path
    state: Path
    address: Path
    containerd: Path
    namespace: str
    metrics_address: str
    bridge_name: str
    bridge_subnet: str
    default_runtime: str
    runtimes: Mapping[str, str]
    snapshotter: str = "overlayfs"
    log_level: str = "info"
    return_grace_s: float = 5.0
    lock_timeout_s: float = 30.0
    disk_reserve_bytes: int = 8 << 20


def parse(arguments: Sequence[str] | None = None) -> Config:
    """The configuration that a command line asks for.

    Raises:
        InvalidArgument: a value makes no sense.
        SystemExit: the command line cannot be parsed, or asked for help or the version.
    """
    given = _parser().parse_args(arguments)
    state: Path = given.state.absolute()
    config = Config(
        root=given.root.absolute(),
        state=state,
        address=(given.address or state / "daemon.sock").absolute(),
        containerd=given.containerd.absolute(),
        namespace=given.namespace,
        metrics_address=given.metrics_address,
        bridge_name=given.bridge_name,
        bridge_subnet=_subnet(given.bridge_subnet),
        default_runtime=given.default_runtime,
        runtimes=_runtimes(given.runtime),
        snapshotter=given.snapshotter,
        log_level=given.log_level,
        lock_timeout_s=given.lock_timeout,
    )
    if config.default_runtime not in config.runtimes:
        known = ", ".join(sorted(config.runtimes))
        raise InvalidArgument(
            f"default runtime '{config.default_runtime}' is not configured, known are: {known}; "
            f"add it with --runtime {config.default_runtime}=/path/of/its/program",
            field="default-runtime",
        )
    return config


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="theseus-daemon",
        description="Containers, images, networks and volumes; runs them through containerd.",
    )
    add = parser.add_argument
    add("--root", type=Path, default=Path("/var/lib/theseus/daemon"), help="records and logs")
    add("--state", type=Path, default=Path("/run/theseus/daemon"), help="sockets, namespaces")
    add("--address", type=Path, default=None, help="socket to serve (STATE/daemon.sock)")
    add(
        "--containerd",
        type=Path,
        default=Path("/run/theseus/containerd/containerd.sock"),
        help="socket of containerd (%(default)s)",
    )
    add("--namespace", default="theseus", help="namespace in containerd (%(default)s)")
    add("--metrics-address", default="", help="unix:PATH or HOST:PORT; none if not given")
    add("--bridge-name", default="theseus0", help="default bridge (%(default)s)")
    add(
        "--bridge-subnet",
        default="10.77.0.1/16",
        help="its own address, with the subnet's prefix (%(default)s)",
    )
    add("--default-runtime", default="runc", help="name of an OCI runtime (%(default)s)")
    add(
        "--runtime",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="an OCI runtime; may be repeated; runc and crun are found on PATH",
    )
    add("--snapshotter", default="overlayfs", help="containerd's snapshotter (%(default)s)")
    add("--log-level", choices=log.LEVELS, default="info", help="(%(default)s)")
    add(
        "--lock-timeout",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="how long to wait for another daemon to leave the root (%(default)s)",
    )
    add("--version", action="version", version=f"theseus-daemon {VERSION}")
    return parser


def _runtimes(given: Sequence[str]) -> dict[str, str]:
    runtimes = {name: shutil.which(name) or name for name in _RUNTIMES}
    for pair in given:
        name, equals, path = pair.partition("=")
        if not equals or not name or not path:
            raise InvalidArgument(f"runtime '{pair}' is not of the form NAME=PATH", field="runtime")
        if os.sep in path and not Path(path).is_absolute():
            raise InvalidArgument(
                f"path of runtime '{name}' is not absolute: {path}", field="runtime"
            )
        runtimes[name] = path if os.sep in path else (shutil.which(path) or path)
    return runtimes


def _subnet(text: str) -> str:
    """An address with its prefix; for a bare subnet, its first address."""
    try:
        interface = ipaddress.IPv4Interface(text)
    except ValueError as error:
        raise InvalidArgument(
            f"bridge subnet '{text}' is not an IPv4 network: {error}", field="bridge-subnet"
        ) from error
    network = interface.network
    if network.prefixlen > 29:
        raise InvalidArgument(
            f"bridge subnet '{text}' is too small: it takes /29 or more", field="bridge-subnet"
        )
    own = interface.ip if interface.ip != network.network_address else network[1]
    return f"{own}/{network.prefixlen}"
