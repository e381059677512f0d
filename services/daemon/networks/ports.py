"""Published ports: checks, conflicts, and whether a program of the host has one already.

The host's port is not held by a socket: that would have to live in a process, and containers need
none of ours. So a program that binds the port later succeeds, and gets no connections.
"""

from __future__ import annotations

import errno
import os
import socket
from dataclasses import replace
from ipaddress import AddressValueError, IPv4Address
from typing import TYPE_CHECKING

from services.common.errors import FailedPrecondition, InvalidArgument
from services.daemon.networks.network import ANY_ADDRESS, PortMapping

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

PROTOCOLS = ("tcp", "udp")
_SOCKET_TYPES = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}


class PortInUse(FailedPrecondition):
    """The host's port is taken."""


def normalize_ports(ports: Iterable[PortMapping]) -> tuple[PortMapping, ...]:
    """Check mappings and fill in what an empty address and protocol mean; doubles are dropped.

    Raises:
        InvalidArgument: a port, address or protocol that cannot be published.
    """
    return tuple(dict.fromkeys(_normalize(port) for port in ports))


def check_conflicts(wanted: Sequence[PortMapping], published: Iterable[PortMapping]) -> None:
    """Compare mappings with one another and with those that are published.

    Raises:
        PortInUse: two of them want the same port of the same address.
    """
    seen = list(published)
    for port in wanted:
        for other in seen:
            if _overlap(port, other):
                raise PortInUse(
                    f"Bind for {port.host_ip}:{port.host_port} failed: port is already allocated",
                    resource=("port", f"{port.host_ip}:{port.host_port}/{port.protocol}"),
                )
        seen.append(port)


def probe(port: PortMapping) -> PortMapping:
    """Bind the host's port for a moment: the kernel knows about every other program.

    Returns:
        The mapping; with host port 0, the one that the kernel picked.

    Raises:
        PortInUse: a program has it, or the address is not one of the host's.
    """
    with socket.socket(socket.AF_INET, _SOCKET_TYPES[port.protocol]) as probing:
        if port.protocol == "tcp":
            # Connections in TIME_WAIT do not count; a listening socket still does.
            probing.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probing.bind((port.host_ip, port.host_port))
        except OSError as error:
            reason = os.strerror(error.errno or errno.EINVAL).lower()
            raise PortInUse(
                f"failed to bind host port {port.host_ip}:{port.host_port}/{port.protocol}: "
                f"{reason}",
                resource=("port", f"{port.host_ip}:{port.host_port}/{port.protocol}"),
            ) from error
        return replace(port, host_port=probing.getsockname()[1])


def _normalize(port: PortMapping) -> PortMapping:
    if not 0 < port.container_port < 65536:
        raise InvalidArgument(f"invalid container port: {port.container_port}", field="ports")
    if not 0 <= port.host_port < 65536:
        raise InvalidArgument(f"invalid host port: {port.host_port}", field="ports")
    protocol = port.protocol.lower() or "tcp"
    if protocol not in PROTOCOLS:
        raise InvalidArgument(f"invalid proto: {port.protocol}", field="ports")
    try:
        address = IPv4Address(port.host_ip or ANY_ADDRESS)
    except AddressValueError as error:
        raise InvalidArgument(
            f"invalid IP address: {port.host_ip}, ports are published on IPv4 addresses",
            field="ports",
        ) from error
    return replace(port, host_ip=str(address), protocol=protocol)


def _overlap(one: PortMapping, other: PortMapping) -> bool:
    return (
        (one.protocol, one.host_port) == (other.protocol, other.host_port)
        and one.host_port != 0
        and (one.host_ip == other.host_ip or ANY_ADDRESS in (one.host_ip, other.host_ip))
    )
