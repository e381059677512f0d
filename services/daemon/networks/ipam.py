"""Which address a container gets: the lowest free one that nobody had a moment ago.

A connection of the one who had it before, a neighbour's ARP entry or the link of a namespace that
is being destroyed may outlive an endpoint by seconds; so an address rests before it is used again,
as long as there are others.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Interface
from typing import TYPE_CHECKING

from services.common.errors import ResourceExhausted

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

REST_NS = 60 * 1_000_000_000


def choose_address(
    gateway: IPv4Interface,
    *,
    used: Collection[int],
    released_at_ns: Mapping[int, int],
    now_ns: int,
) -> IPv4Address:
    """Pick an address.

    Args:
        gateway: address and prefix of the subnet; never given away.
        used: addresses of endpoints.
        released_at_ns: when addresses were given back, where that is remembered.
        now_ns: time of the same clock.

    Raises:
        ResourceExhausted: every address of the subnet is in use.
    """
    subnet = gateway.network
    taken = {int(gateway.ip), *used}
    first, last = int(subnet.network_address) + 1, int(subnet.broadcast_address) - 1
    resting: list[tuple[int, int]] = []
    for address in range(first, last + 1):
        if address in taken:
            continue
        released = released_at_ns.get(address)
        if released is None or now_ns - released >= REST_NS:
            return IPv4Address(address)
        resting.append((released, address))
    if not resting:
        raise ResourceExhausted(
            f"no available IPv4 addresses on this network's address pool: {subnet}"
        )
    return IPv4Address(min(resting)[1])


def mac_of(address: IPv4Address) -> str:
    """The hardware address that goes with an address: the same one always, so ARP stays true."""
    return ":".join(f"{byte:02x}" for byte in (0x02, 0x42, *address.packed))
