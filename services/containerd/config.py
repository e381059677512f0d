"""containerd's configuration: one frozen dataclass, made from the command line."""

from __future__ import annotations

import argparse
import shutil
import sys
from dataclasses import field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from services.common import VERSION, log
from services.common.errors import InvalidArgument
from services.common.frozen import frozen
from services.containerd.config_file import ConfigFile, ProxySnapshotter, read_config_file
from services.containerd.gc.policy import GcPolicy
from services.containerd.runtimes import OUR_RUNTIMES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

REGISTRY_HOSTS = Path("/etc/theseus/certs.d")
_WAITING_SHIMS_MAX = 64
_GC_OPTIONS = {
    "gc_pause_threshold": "pause_threshold",
    "gc_deletion_threshold": "deletion_threshold",
    "gc_mutation_threshold": "mutation_threshold",
    "gc_schedule_delay": "schedule_delay_s",
    "gc_startup_delay": "startup_delay_s",
    "gc_idle_interval": "idle_interval_s",
}
_SHIM_MODULE = (sys.executable, "-m", "services.shim")


@frozen
class Config:
    """Everything that can be configured.

    Attributes:
        root: records, blobs and snapshots; survives reboots.
        state: sockets and bundles; gone with a reboot.
        address: the socket served.
        metrics_address: ``unix:PATH`` or ``HOST:PORT``; empty: none.
        log_level: one of services.common.log.LEVELS, for shims too.
        shim: the command that starts the shim factory, without its arguments.
        runtimes: programs of shims that others wrote, by the runtime name that stands for them.
        publisher: the program that shims without a connection publish their events by.
        default_runtime: the OCI runtime of containers that name none.
        snapshotter: the snapshotter of requests that name none.
        shim_grace_s: how long a shim may take to register after a start of containerd.
        containers_per_shim: how many containers of a namespace one shim serves; those of a pod
            share one in any case.
        merge_memory: whether the kernel merges what shims' memory has in common.
        lock_timeout_s: how long to wait for another containerd to leave the root.
        drain_s: how long calls under way may take once a stop was asked for.
        gc: when garbage is collected.
        journal_events: how many events the journal keeps.
        journal_s: for how long it keeps them.
        journal_bytes: how many bytes of them it keeps.
        max_archive_bytes: the largest archive that is imported.
        max_downloads: blobs that are fetched at once, in all; also those that are sent.
        unpack_workers: processes that unpack layers.
        waiting_shims: shims that wait ready for a container; 4 MiB each, 7 after an earlier one.
        registry_hosts: directories with a hosts.toml, or certificates, for each registry.
        proxy_snapshotters: snapshotters that other services are.
        disk_reserve_bytes: room that is kept for records on a full disk.
        disk_floor_bytes: what has to stay free on the disk when blobs and layers come in.
    """

    root: Path
    state: Path
    address: Path
    metrics_address: str = ""
    log_level: str = "info"
    shim: tuple[str, ...] = _SHIM_MODULE
    runtimes: Mapping[str, Path] = field(default_factory=dict)
    publisher: str = "theseus-containerd"
    default_runtime: str = "runc"
    snapshotter: str = "overlayfs"
    shim_grace_s: float = 10.0
    containers_per_shim: int = 1
    merge_memory: bool = True
    lock_timeout_s: float = 30.0
    drain_s: float = 5.0
    gc: GcPolicy = field(default_factory=GcPolicy)
    journal_events: int = 100_000
    journal_s: float = 7 * 24 * 3600.0
    journal_bytes: int = 64 << 20
    max_archive_bytes: int = 64 << 30
    max_downloads: int = 6
    unpack_workers: int = 2
    waiting_shims: int = 2
    registry_hosts: tuple[Path, ...] = (REGISTRY_HOSTS,)
    proxy_snapshotters: tuple[ProxySnapshotter, ...] = ()
    disk_reserve_bytes: int = 8 << 20
    disk_floor_bytes: int = 64 << 20


def parse(arguments: Sequence[str] | None = None) -> Config:
    """The configuration that a command line asks for.

    Raises:
        InvalidArgument: a value makes no sense.
        SystemExit: the command line cannot be parsed, or asked for help or the version.
    """
    given = _parser().parse_args(arguments)
    state: Path = given.state.absolute()
    for name in ("disk_reserve", "disk_floor"):
        if getattr(given, name) < 0:
            raise InvalidArgument(
                f"--{name.replace('_', '-')} is a number of bytes and cannot be negative",
                field=name,
            )
    for name in ("grace_time", "lock_timeout", "drain_time"):
        if getattr(given, name) < 0:
            raise InvalidArgument(
                f"--{name.replace('_', '-')} is a number of seconds and cannot be negative",
                field=name,
            )
    for name in (
        "containers_per_shim",
        "journal_events",
        "journal_bytes",
        "max_archive_bytes",
        "max_downloads",
        "unpack_workers",
    ):
        if getattr(given, name) < 1:
            raise InvalidArgument(f"--{name.replace('_', '-')} must be at least 1", field=name)
    if not 0 <= given.waiting_shims <= _WAITING_SHIMS_MAX:
        raise InvalidArgument(
            f"--waiting-shims must be between 0 and {_WAITING_SHIMS_MAX}", field="waiting_shims"
        )
    file = read_config_file(given.config) if given.config else ConfigFile()
    return Config(
        root=given.root.absolute(),
        state=state,
        address=(given.address or state / "containerd.sock").absolute(),
        metrics_address=given.metrics_address,
        log_level=given.log_level,
        shim=_shim_command(given.shim),
        runtimes=_runtimes(given.runtime),
        publisher=str(Path(sys.executable).with_name("theseus-containerd")),
        default_runtime=given.default_runtime,
        snapshotter=given.snapshotter,
        shim_grace_s=given.grace_time,
        containers_per_shim=given.containers_per_shim,
        merge_memory=given.merge_memory == "on",
        lock_timeout_s=given.lock_timeout,
        drain_s=given.drain_time,
        gc=_gc_policy(given, file.gc),
        journal_events=given.journal_events,
        journal_bytes=given.journal_bytes,
        journal_s=given.journal_days * 24 * 3600,
        max_archive_bytes=given.max_archive_bytes,
        max_downloads=given.max_downloads,
        unpack_workers=given.unpack_workers,
        waiting_shims=given.waiting_shims,
        disk_reserve_bytes=given.disk_reserve,
        disk_floor_bytes=given.disk_floor,
        proxy_snapshotters=file.proxy_snapshotters,
        registry_hosts=tuple(Path(part) for part in given.registry_hosts.split(":") if part),
    )


def _gc_policy(given: argparse.Namespace, configured: GcPolicy) -> GcPolicy:
    """What a file says of the collection, overruled by the command line."""
    changes = {}
    for option, attribute in _GC_OPTIONS.items():
        value = getattr(given, option)
        if value is None:
            continue
        if not value >= 0:  # NaN is refused, too
            raise InvalidArgument(f"--{option.replace('_', '-')} cannot be negative", field=option)
        changes[attribute] = value
    return replace(configured, **changes)


def _shim_command(program: str) -> tuple[str, ...]:
    if program:
        # Shims are told to execute it, wherever they are: an absolute path.
        return (shutil.which(program) or str(Path(program).absolute()),)
    beside = Path(sys.executable).with_name("theseus-shim")
    return (str(beside),) if beside.exists() else _SHIM_MODULE


def _runtimes(given: Sequence[str]) -> dict[str, Path]:
    runtimes = {}
    for text in given:
        name, _, path = text.partition("=")
        if not name or not path.startswith("/") or name in OUR_RUNTIMES:
            raise InvalidArgument(
                f"--runtime {text!r} is not NAME=PATH with the absolute path of a shim's program "
                f"and a name that is none of {', '.join(OUR_RUNTIMES)}",
                field="runtime",
            )
        runtimes[name] = Path(path)
    return runtimes


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="theseus-containerd",
        description="Keeps images, snapshots and containers of this machine, and serves "
        "containerd's API on a Unix socket.",
        epilog="'theseus-containerd check' compares a root that is not in use with its records; "
        "see 'theseus-containerd check --help'.",
    )
    add = parser.add_argument
    add("--version", action="version", version=f"theseus-containerd {VERSION}")
    add("--root", type=Path, default=Path("/var/lib/theseus/containerd"), metavar="DIR")
    add("--state", type=Path, default=Path("/run/theseus/containerd"), metavar="DIR")
    add("--address", type=Path, metavar="SOCKET", help="default: containerd.sock below --state")
    add("--metrics-address", default="", metavar="unix:PATH|HOST:PORT")
    add("--log-level", choices=log.LEVELS, default="info")
    add("--shim", default="", metavar="PROGRAM", help="default: theseus-shim beside Python")
    add("--waiting-shims", type=int, default=2, metavar="N", help="kept ready; 4 to 7 MiB each")
    add(
        "--runtime",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="a runtime and the program of its shim, which others wrote; may be repeated",
    )
    add("--default-runtime", default="runc", metavar="NAME")
    add("--snapshotter", default="overlayfs", metavar="NAME")
    add("--config", type=Path, metavar="FILE", help="config.toml: its [proxy_plugins] are used")
    add("--grace-time", type=float, default=10.0, metavar="S", help="for shims to register")
    add("--containers-per-shim", type=int, default=1, metavar="N", help="pods share one anyway")
    add("--merge-memory", choices=("on", "off"), default="on", help="of shims, by the kernel's KSM")
    add("--lock-timeout", type=float, default=30.0, metavar="S", help="for the root to be free")
    add("--drain-time", type=float, default=5.0, metavar="S", help="for calls under way at a stop")
    collection = parser.add_argument_group(
        "collection of garbage", "overrule plugins.'io.containerd.gc.v1.scheduler' of --config"
    ).add_argument
    collection(
        "--gc-pause-threshold",
        type=float,
        metavar="SHARE",
        help="of the time, which scheduled collections may take; 0.02",
    )
    collection(
        "--gc-deletion-threshold",
        type=int,
        metavar="N",
        help="deletions after which one does not wait for its interval; 0: none",
    )
    collection(
        "--gc-mutation-threshold",
        type=int,
        metavar="N",
        help="changes after which one is scheduled without a deletion; 100",
    )
    collection(
        "--gc-schedule-delay",
        type=float,
        metavar="S",
        help="before one that is asked for, or due by the number of deletions; 0",
    )
    collection("--gc-startup-delay", type=float, metavar="S", help="before the first one; 0.1")
    collection(
        "--gc-idle-interval",
        type=float,
        metavar="S",
        help="after which one comes in any case; 300, 0: none",
    )
    add("--journal-events", type=int, default=100_000, metavar="N", help="events kept")
    add("--journal-bytes", type=int, default=64 << 20, metavar="N", help="bytes of them kept")
    add("--journal-days", type=float, default=7.0, metavar="DAYS", help="days they are kept")
    add("--max-archive-bytes", type=int, default=64 << 30, metavar="N")
    add("--max-downloads", type=int, default=6, metavar="N", help="blobs fetched at once")
    add("--disk-reserve", type=int, default=8 << 20, metavar="N", help="bytes for a full disk")
    add("--disk-floor", type=int, default=64 << 20, metavar="N", help="bytes that stay free")
    add("--unpack-workers", type=int, default=2, metavar="N", help="processes that unpack")
    add(
        "--registry-hosts",
        default=str(REGISTRY_HOSTS),
        metavar="DIR[:DIR]",
        help="has hosts.toml files, as containerd's config_path; default: %(default)s",
    )
    return parser
