"""Links of the bridge network: what the kernel, or ``ip -batch``, is told and asked.

Everything here looks at, or changes, the network namespace that this process runs in; only
:func:`make_container_side` that of the thread which calls it.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import re
import socket
import struct
from contextlib import closing
from hashlib import sha256
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from pathlib import Path
from typing import TYPE_CHECKING

from services.common.errors import Internal
from services.daemon.networks.command import run, to_end
from services.daemon.networks.ipam import mac_of
from services.daemon.networks.rtnetlink import Rtnetlink

if TYPE_CHECKING:
    from services.daemon.networks.network import Endpoint, NetworkConfig

CONTAINER_LINK = "eth0"

_LINK_NAME = re.compile(r"th[0-9a-f]{12}")
_DEFAULT_MTU = 1500
_SIOCGIFMTU = 0x8921  # linux/sockios.h
_SYSCTL = Path("/proc/sys/net/ipv4")


def link_name(bridge: str, container_id: str, created_at_ns: int) -> str:
    """Name of an endpoint's link on the host: never used twice, since an old one lingers."""
    seed = f"{bridge}/{container_id}/{created_at_ns}"
    return f"th{sha256(seed.encode()).hexdigest()[:12]}"


def make_container_side(endpoint: Endpoint, mtu: int) -> None:
    """Make the link in the container's namespace, and the other end in ours. Blocks shortly.

    The calling thread is in the container's namespace (:func:`netns.inside`).

    Raises:
        Internal: the kernel refused a step; those before it were done.
    """
    with Rtnetlink() as kernel:
        kernel.add_veth(
            CONTAINER_LINK, mac=endpoint.mac, mtu=mtu, peer=endpoint.link, peer_pid=os.getpid()
        )
        kernel.set_up(CONTAINER_LINK, plain=True)
        index = socket.if_nametoindex(CONTAINER_LINK)
        kernel.add_address(index, IPv4Interface((endpoint.ip, endpoint.prefix_length)))
        kernel.add_default_route(endpoint.gateway)


async def plug(config: NetworkConfig, link: str, *, hairpin: bool) -> None:
    """Put an endpoint's link into the bridge.

    ``hairpin`` lets frames leave by the link that they came from: with br_netfilter loaded, a
    container that uses a port which it published itself is led back to it inside the bridge.
    """

    def work() -> None:
        try:
            bridge = socket.if_nametoindex(config.bridge)
        except OSError as error:
            raise Internal(f"there is no bridge {config.bridge}") from error
        with Rtnetlink() as kernel:
            kernel.set_up(link, master=bridge, plain=True)
            if hairpin:
                kernel.set_hairpin(link)

    await to_end(asyncio.get_running_loop().run_in_executor(None, work))


async def make_bridge(config: NetworkConfig, mtu: int) -> None:
    """Make the bridge, or bring the one that is there to its address and state."""
    bridge, gateway = config.bridge, config.gateway
    # A hardware address of its own: otherwise it changes with the links, under the containers.
    made = "" if exists(bridge) else f"link add name {bridge} type bridge\n"
    await run(
        ["ip", "-batch", "-"],
        text=f"{made}link set {bridge} address {mac_of(gateway.ip)} mtu {mtu} "
        f"addrgenmode none up\n"
        f"addr replace {gateway} broadcast {gateway.network.broadcast_address} dev {bridge}\n",
    )


async def delete(link: str) -> None:
    """Delete a link that may be gone already."""
    if exists(link):
        await run(["ip", "link", "delete", link])


async def plugged(bridge: str) -> set[str]:
    """Names of the links of endpoints that are in the bridge."""
    text = await run(["ip", "-json", "link", "show", "master", bridge])
    names = {str(entry.get("ifname", "")) for entry in json.loads(text or "[]")}
    return {name for name in names if _LINK_NAME.fullmatch(name)}


def exists(link: str) -> bool:
    """Whether there is a link of this name."""
    try:
        socket.if_nametoindex(link)
    except OSError:
        return False
    return True


def allow_forwarding(bridge: str) -> None:
    """Set the switches without which no packet gets through. Blocks shortly.

    ``route_localnet`` lets connections to 127.0.0.1 be led to a container; the rules of
    :mod:`services.daemon.networks.firewall` keep the way back closed.
    """
    for switch in (_SYSCTL / "ip_forward", _SYSCTL / "conf" / bridge / "route_localnet"):
        if switch.read_text().strip() != "1":
            switch.write_text("1")


def default_mtu() -> int:
    """The MTU of the default route's link, in bytes; 1500 without one. Blocks shortly."""
    for name, network in routes():
        if network.prefixlen == 0:
            return _mtu(name)
    return _DEFAULT_MTU


def routes() -> list[tuple[str, IPv4Network]]:
    """Routes of the main table: name of the link, and where it leads. Blocks shortly."""
    found = []
    for line in Path("/proc/self/net/route").read_text().splitlines()[1:]:
        fields = line.split()
        # Addresses are there as the processor has them (fib_route_seq_show in the kernel).
        destination, mask = (struct.pack("=I", int(fields[place], 16)) for place in (1, 7))
        network = IPv4Network((IPv4Address(destination), str(IPv4Address(mask))), strict=False)
        found.append((fields[0], network))
    return found


def _mtu(link: str) -> int:
    with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as asking:
        request = struct.pack("16si12x", link.encode(), 0)
        answer = fcntl.ioctl(asking, _SIOCGIFMTU, request)
    mtu: int = struct.unpack("16si12x", answer)[1]
    return mtu
