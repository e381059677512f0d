"""What a network is to the daemon: the interface, and the data that goes over it.

An *endpoint* is one container's place in a network: an address, a link, its published ports. It
belongs to the network namespace that the container runs in, a file at ``<state>/netns/<id>`` on
which the namespace is mounted; no process is needed to keep it. An endpoint is recorded in the
database before the kernel hears of it, and forgotten after the kernel has nothing left of it, so
the record always covers what there is and :meth:`Network.restore` can finish whatever was cut off.

Nothing that a running container needs lives in this process: packets are the kernel's business.
"""

from __future__ import annotations

from ipaddress import IPv4Interface
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from services.common.frozen import frozen

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Sequence
    from ipaddress import IPv4Address

_DEFAULT_GATEWAY = IPv4Interface("10.77.0.1/16")

ANY_ADDRESS = "0.0.0.0"


@frozen
class NetworkConfig:
    """A bridge network of the engine.

    Two engines on one host need different bridges, tables and subnets. The default subnet lies
    outside of those that docker (172.17.0.0 to 172.31.255.255, 192.168.0.0/16), podman
    (10.88.0.0/16 and up) and the usual Kubernetes networks take, and outside of cloud providers'
    default networks.

    Attributes:
        name: as users see it.
        bridge: name of the link; at most 15 characters.
        table: name of the nftables table, family ip, that holds every rule of ours.
        gateway: the bridge's own address, with the length of the subnet's prefix.
        netns_directory: where namespaces are mounted; restore() removes strangers from it.
        mtu: of links in bytes; 0 takes that of the host's default route.
    """

    netns_directory: Path = Path("/run/theseus/daemon/netns")
    name: str = "bridge"
    bridge: str = "theseus0"
    table: str = "theseus"
    gateway: IPv4Interface = _DEFAULT_GATEWAY
    mtu: int = 0


@frozen
class PortMapping:
    """One port of a container, published on the host.

    Attributes:
        container_port: 1 to 65535.
        host_port: 0 has one picked.
        host_ip: an IPv4 address of the host; empty or 0.0.0.0 for all.
        protocol: ``tcp`` or ``udp``; empty is tcp.
    """

    container_port: int
    host_port: int = 0
    host_ip: str = ""
    protocol: str = "tcp"


@frozen
class Endpoint:
    """One container's place in a network.

    Attributes:
        ports: as published, every host port and address filled in.
        link: name of the link's end on the host.
    """

    container_id: str
    network: str
    ip: IPv4Address
    prefix_length: int
    gateway: IPv4Address
    mac: str
    link: str
    netns_path: Path
    ports: tuple[PortMapping, ...] = ()


class Network(Protocol):
    """A network that containers are attached to.

    Calls for different containers may run at once; the caller does not attach and detach one
    container at the same time.
    """

    async def attach(
        self,
        container_id: str,
        netns_path: Path,
        ports: Sequence[PortMapping] = (),
        *,
        chosen: Callable[[Endpoint], Awaitable[object]] | None = None,
    ) -> Endpoint:
        """Give a container its place: an address, a default route, its published ports.

        ``chosen`` is awaited while links are made, once it is on record what the place will be. The
        namespace is made when there is none at ``netns_path``. When the call fails, or is
        cancelled, nothing of the endpoint is left, its namespace included.

        Raises:
            AlreadyExists: the container has an endpoint.
            InvalidArgument: a bad port mapping.
            FailedPrecondition: a port is taken, by a container or by a program of the host.
            ResourceExhausted: no address, or no port to pick, is free.
            Internal: the kernel refused a link or a rule.
        """

    async def detach(
        self, container_id: str, *, given_back: Callable[[], Awaitable[object]] | None = None
    ) -> None:
        """Take the place away, with published ports, link and namespace.

        ``given_back`` is awaited beside the record that address and ports are free, before the
        namespace goes: nobody waits for that but the next attach. It is without an endpoint, too.

        Can be repeated, and resumed after an interruption; does no more for a container without
        an endpoint. The kernel takes the link down some milliseconds later, by itself.
        """

    async def endpoint(self, container_id: str) -> Endpoint | None:
        """A container's endpoint, or None."""

    async def endpoints(self) -> list[Endpoint]:
        """All endpoints, by address."""

    async def restore(self, containers: Collection[str]) -> None:
        """Bring the kernel in line with the records, once, when the daemon has started.

        Args:
            containers: ids of those that run, or may run. Endpoints of others are taken away, and
                so is every namespace below ``netns_directory`` with another name. For the rest,
                what is missing (bridge, rules, links) is made again; running connections go on.
        """

    async def teardown_if_unused(self) -> bool:
        """Remove bridge and rules when no endpoint is left; True if they are gone."""
