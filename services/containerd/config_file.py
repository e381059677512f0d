"""What is read of containerd's own ``config.toml``: the proxy plugins, and the schedule of the gc.

    [proxy_plugins.stargz]
      type = "snapshot"
      address = "/run/containerd-stargz-grpc/containerd-stargz-grpc.sock"
      capabilities = ["rebase"]

    [plugins."io.containerd.gc.v1.scheduler"]
      pause_threshold = 0.02
      startup_delay = "100ms"

Everything else in such a file is upstream's business, or an option of the command line.
"""

from __future__ import annotations

import tomllib
from dataclasses import field, replace
from typing import TYPE_CHECKING

from services.common.errors import InvalidArgument, TheseusError, Unimplemented
from services.common.frozen import frozen
from services.containerd.durations import parse_duration
from services.containerd.gc.policy import GcPolicy
from services.containerd.identifiers import checked_identifier

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from typing import Any

_SNAPSHOT = "snapshot"
_KEYS = ("type", "address", "platform", "exports", "capabilities")
_SCHEDULER = "io.containerd.gc.v1.scheduler"
_SHARES = ("pause_threshold",)
_NUMBERS = ("deletion_threshold", "mutation_threshold")
_DURATIONS = ("schedule_delay", "startup_delay")
BUILT_IN = ("overlayfs", "native")
"""Snapshotters that are always there."""


@frozen
class ProxySnapshotter:
    """A snapshotter that another service is: its name, the service's socket, what it can do."""

    name: str
    address: str
    capabilities: tuple[str, ...] = ()


@frozen
class ConfigFile:
    """What a file says: its proxy snapshotters, in its order, and when garbage is collected."""

    proxy_snapshotters: tuple[ProxySnapshotter, ...] = ()
    gc: GcPolicy = field(default_factory=GcPolicy)


def read_config_file(path: Path) -> ConfigFile:
    """What a file says; with defaults for what it says nothing of.

    Raises:
        InvalidArgument: the file cannot be read, or an entry makes no sense.
        Unimplemented: a plugin is of another type.
    """
    try:
        document = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InvalidArgument(f"--config {path}: {error}", field="config") from error
    try:
        proxies = _table(document, "proxy_plugins")
        return ConfigFile(
            tuple(_plugin(name, entry) for name, entry in proxies.items()),
            _gc_policy(_table(_table(document, "plugins"), _SCHEDULER)),
        )
    except TheseusError as error:
        raise type(error)(f"--config {path}: {error.message}", field="config") from error


def _table(document: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    table = document.get(name, {})
    if not isinstance(table, dict):
        raise InvalidArgument(f"{name} is no table")
    return table


def _plugin(name: str, entry: Mapping[str, Any]) -> ProxySnapshotter:
    checked_identifier(name, what="name of a proxy plugin", field="config")
    if name in BUILT_IN:
        raise InvalidArgument(f"proxy plugin {name!r} has the name of a snapshotter that is here")
    if not isinstance(entry, dict):
        raise InvalidArgument(f"proxy plugin {name!r} is no table")
    if unknown := sorted(set(entry).difference(_KEYS)):
        raise InvalidArgument(
            f"proxy plugin {name!r} has {unknown[0]!r}, and can have {', '.join(_KEYS)}"
        )
    if entry.get("type") != _SNAPSHOT:
        raise Unimplemented(
            f"proxy plugin {name!r} has type {entry.get('type')!r}, only {_SNAPSHOT!r} is supported"
        )
    address = entry.get("address")
    if not isinstance(address, str) or not address.removeprefix("unix://").startswith("/"):
        raise InvalidArgument(f"proxy plugin {name!r} needs an address: the path of a Unix socket")
    capabilities = entry.get("capabilities", [])
    if not isinstance(capabilities, list) or not all(isinstance(c, str) for c in capabilities):
        raise InvalidArgument(f"capabilities of proxy plugin {name!r} are no list of words")
    return ProxySnapshotter(name, address, tuple(capabilities))


def _gc_policy(table: Mapping[str, Any]) -> GcPolicy:
    changes: dict[str, Any] = {}
    for key, value in table.items():
        if key in _SHARES:
            valid = isinstance(value, float | int) and not isinstance(value, bool) and value >= 0
            meant = "a number that is not negative"
            changes[key] = value
        elif key in _NUMBERS:
            valid = isinstance(value, int) and not isinstance(value, bool) and value >= 0
            meant = "a whole number that is not negative"
            changes[key] = value
        elif key in _DURATIONS:
            seconds = parse_duration(value) if isinstance(value, str) else None
            valid, meant = seconds is not None, "a time as in '100ms'"
            changes[f"{key}_s"] = seconds
        else:
            known = ", ".join((*_SHARES, *_NUMBERS, *_DURATIONS))
            raise InvalidArgument(f"plugin {_SCHEDULER!r} has {key!r}, and can have {known}")
        if not valid:
            raise InvalidArgument(f"plugin {_SCHEDULER!r} has {key} = {value!r}, not {meant}")
    return replace(GcPolicy(), **changes)
