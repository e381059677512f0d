"""A container's own files on the host: ``<root>/containers/<id>/``.

    hostname, hosts, resolv.conf    bound into the container at /etc
    <id>-json.log[.N]               written by the shim

The directory is made after the container's record and removed before it, so that one without a
record is never left.
"""

from __future__ import annotations

import ipaddress
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from services.common.frozen import frozen

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from services.daemon.containers.record import ContainerId

_HOSTS = """\
127.0.0.1\tlocalhost
::1\tlocalhost ip6-localhost ip6-loopback
fe00::0\tip6-localnet
ff00::0\tip6-mcastprefix
ff02::1\tip6-allnodes
ff02::2\tip6-allrouters
"""
# moby's choice for a host whose only name servers are its own loopback's
_FALLBACK_SERVERS = ("8.8.8.8", "8.8.4.4")


@frozen
class HostFiles:
    """Where the host's own files are."""

    hosts: Path = Path("/etc/hosts")
    resolv_conf: Path = Path("/etc/resolv.conf")
    resolved: Path = Path("/run/systemd/resolve/resolv.conf")


class ContainerFiles:
    """The files of all containers below ``root``. All methods block."""

    def __init__(self, root: Path, *, host: HostFiles | None = None) -> None:
        self._root = root
        self._host = host or HostFiles()

    def directory(self, container_id: ContainerId) -> Path:
        """A container's directory."""
        return self._root / container_id

    def log_path(self, container_id: ContainerId) -> Path:
        """A container's log file."""
        return self._root / container_id / f"{container_id}-json.log"

    def create(self, container_id: ContainerId) -> None:
        """Make a container's directory; one that is there is left."""
        self.directory(container_id).mkdir(mode=0o710, parents=True, exist_ok=True)

    def write(
        self, container_id: ContainerId, *, hostname: str, address: str, host_network: bool
    ) -> Mapping[str, str]:
        """Write what the container is to see at /etc.

        Args:
            container_id: whose.
            hostname: its name.
            address: its own address, or empty.
            host_network: it shares the host's network, and so the host's names.

        Returns:
            Path in the container -> path on the host.
        """
        directory = self.directory(container_id)
        contents = {
            "hostname": f"{hostname}\n",
            "hosts": self._hosts(hostname, address, host_network),
            "resolv.conf": self._resolv_conf(host_network),
        }
        for name, text in contents.items():
            # In place: a file that is bound into a container keeps its inode.
            path = directory / name
            path.write_text(text)
            path.chmod(0o644)
        return {f"/etc/{name}": str(directory / name) for name in contents}

    def remove(self, container_id: ContainerId) -> None:
        """Remove a container's directory with its logs."""
        directory = self.directory(container_id)
        if directory.exists():
            shutil.rmtree(directory)

    def sweep(self, known: Collection[str]) -> list[str]:
        """Remove directories of containers that are not known; returns their names."""
        if not self._root.exists():
            return []
        strangers = [entry.name for entry in os.scandir(self._root) if entry.name not in known]
        for name in strangers:
            shutil.rmtree(self._root / name, ignore_errors=True)
        return strangers

    def _hosts(self, hostname: str, address: str, host_network: bool) -> str:
        if host_network:
            return _read(self._host.hosts) or _HOSTS
        names = hostname if "." not in hostname else f"{hostname} {hostname.partition('.')[0]}"
        return f"{_HOSTS}{address}\t{names}\n" if address else _HOSTS

    def _resolv_conf(self, host_network: bool) -> str:
        text = _read(self._host.resolv_conf)
        if host_network:
            return text
        if not _servers(text) and self._host.resolved.exists():
            text = _read(self._host.resolved)
        kept = [line for line in text.splitlines() if not _is_loopback(line)]
        if not _servers(text):
            kept += [f"nameserver {server}" for server in _FALLBACK_SERVERS]
        return "\n".join(kept) + "\n"


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="surrogateescape")
    except OSError:
        return ""


def _servers(text: str) -> list[str]:
    """Name servers that can be reached from another network namespace."""
    lines = [line for line in text.splitlines() if line.split()[:1] == ["nameserver"]]
    return [line for line in lines if not _is_loopback(line)]


def _is_loopback(line: str) -> bool:
    words = line.split()
    if words[:1] != ["nameserver"] or len(words) < 2:
        return False
    try:
        return ipaddress.ip_address(words[1].partition("%")[0]).is_loopback
    except ValueError:
        return False
