"""What is read of containerd's own ``config.toml``: the proxy plugins.

    [proxy_plugins.stargz]
      type = "snapshot"
      address = "/run/containerd-stargz-grpc/containerd-stargz-grpc.sock"
      capabilities = ["rebase"]

Everything else in such a file is upstream's business, or an option of the command line.
"""

from __future__ import annotations

import tomllib
from typing import TYPE_CHECKING

from services.common.errors import InvalidArgument, TheseusError, Unimplemented
from services.common.frozen import frozen
from services.containerd.identifiers import checked_identifier

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from typing import Any

_SNAPSHOT = "snapshot"
_KEYS = ("type", "address", "platform", "exports", "capabilities")
BUILT_IN = ("overlayfs", "native")
"""Snapshotters that are always there."""


@frozen
class ProxySnapshotter:
    """A snapshotter that another service is: its name, the service's socket, what it can do."""

    name: str
    address: str
    capabilities: tuple[str, ...] = ()


def read_proxy_plugins(path: Path) -> tuple[ProxySnapshotter, ...]:
    """The snapshotters that a file names, in its order.

    Raises:
        InvalidArgument: the file cannot be read, or an entry makes no sense.
        Unimplemented: a plugin is of another type.
    """
    try:
        document = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InvalidArgument(f"--config {path}: {error}", field="config") from error
    table = document.get("proxy_plugins", {})
    if not isinstance(table, dict):
        raise InvalidArgument(f"--config {path}: proxy_plugins is no table", field="config")
    try:
        return tuple(_plugin(name, entry) for name, entry in table.items())
    except TheseusError as error:
        raise type(error)(f"--config {path}: {error.message}", field="config") from error


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
