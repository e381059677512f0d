"""The rules of a bridge network: one nftables table, every change one transaction.

Published ports are elements of two maps, so that attaching a container changes elements and never
a rule. The text made here goes to ``nft -f -``, which hands it to the kernel as one transaction:
all of it happens, or nothing.

    raw          keeps others from addressing containers past their published ports, and
                 containers from reaching the host's loopback (which route_localnet would allow)
    publish      host address and port -> container's address and port
    postrouting  containers leave with the host's address; a connection that comes back to the
                 bridge (loopback, or a container using a published port) gets the bridge's
    forward      out of the bridge everything, into it only answers and what was published

A chain with policy drop in somebody else's table still has the last word, as always in nftables.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import structlog

from services.common.errors import Internal
from services.daemon.networks.command import run
from services.daemon.networks.network import ANY_ADDRESS

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Sequence
    from ipaddress import IPv4Address

    from services.daemon.networks.network import NetworkConfig, PortMapping

log = structlog.get_logger(__name__)

Published = tuple["PortMapping", "IPv4Address"]
"""A mapping and the address of its container."""


class Table:
    """The table as the kernel has it, kept in line with the records.

    Changes that wait for one another go to the kernel together: removing an element takes it
    10 ms and more, whatever the number of elements.

    Args:
        config: of the network.
        recorded: reads what the records say is published. A caller records a port before
            :meth:`publish`, and forgets it before :meth:`withdraw`.
        apply: hands one transaction to the kernel.
    """

    def __init__(
        self,
        config: NetworkConfig,
        recorded: Callable[[], Awaitable[Iterable[Published]]],
        *,
        apply: Callable[[str], Awaitable[None]] | None = None,
    ) -> None:
        self._config = config
        self._recorded = recorded
        self._apply = apply or _apply
        self._lock = asyncio.Lock()
        self._waiting: list[str] = []
        self._stale = False  # the kernel may differ from the records

    async def rebuild(self) -> None:
        """Write the whole table from the records."""
        async with self._lock:
            await self._rebuild()

    async def remove(self) -> None:
        """Remove the table, if there is one."""
        async with self._lock:
            await self._apply(removal(self._config))

    async def publish(self, published: Sequence[Published]) -> None:
        """Lead ports to containers."""
        await self._change(addition(self._config, published))

    async def withdraw(self, published: Sequence[Published]) -> None:
        """Lead ports nowhere; with nothing to withdraw, make up for a change that was cut off."""
        if published or self._stale:
            await self._change(withdrawal(self._config, published))

    def distrust(self) -> None:
        """Have the next change write the whole table, which may differ from the records."""
        self._stale = True

    async def _change(self, change: str) -> None:
        self._waiting.append(change)
        async with self._lock:
            changes, self._waiting = self._waiting, []
            if self._stale:
                await self._rebuild()
            elif changes:
                await self._try("".join(changes))

    async def _try(self, text: str) -> None:
        try:
            await self._apply(text)
        except Internal as error:
            # Somebody flushed the ruleset, or an element is not what the records say.
            log.warning("rules are written anew", table=self._config.table, error=error.message)
            await self._rebuild()
        except BaseException:
            self._stale = True
            raise

    async def _rebuild(self) -> None:
        self._stale = False
        try:
            await self._apply(ruleset(self._config, await self._recorded()))
        except BaseException:
            self._stale = True
            raise


def ruleset(config: NetworkConfig, published: Iterable[Published]) -> str:
    """The whole table, in place of what there is of it."""
    bridge, subnet = f'"{config.bridge}"', config.gateway.network
    return f"""\
{removal(config)}
table ip {config.table} {{
    map published {{
        type inet_proto . inet_service : ipv4_addr . inet_service
    }}
    map published_at {{
        type ipv4_addr . inet_proto . inet_service : ipv4_addr . inet_service
    }}
    chain raw {{
        type filter hook prerouting priority raw; policy accept;
        iifname {bridge} ip daddr 127.0.0.0/8 drop
        iifname != {{ {bridge}, "lo" }} ip daddr {subnet} ip daddr != {config.gateway.ip} drop
    }}
    chain publish {{
        dnat ip to ip daddr . meta l4proto . th dport map @published_at
        dnat ip to meta l4proto . th dport map @published
    }}
    chain prerouting {{
        type nat hook prerouting priority dstnat; policy accept;
        iifname != "lo" ip daddr 127.0.0.0/8 return
        fib daddr type local meta l4proto {{ tcp, udp }} jump publish
    }}
    chain output {{
        type nat hook output priority -100; policy accept;
        fib daddr type local meta l4proto {{ tcp, udp }} jump publish
    }}
    chain postrouting {{
        type nat hook postrouting priority srcnat; policy accept;
        oifname != {bridge} ip saddr {subnet} masquerade
        oifname {bridge} ip saddr {{ 127.0.0.0/8, {subnet} }} ct status dnat masquerade
    }}
    chain forward {{
        type filter hook forward priority filter; policy accept;
        iifname {bridge} accept
        oifname {bridge} ct state established,related accept
        oifname {bridge} ct status dnat accept
        oifname {bridge} drop
    }}
}}
{addition(config, published)}"""


def removal(config: NetworkConfig) -> str:
    """No table, whether there was one or not."""
    return f"add table ip {config.table}\ndelete table ip {config.table}\n"


def addition(config: NetworkConfig, published: Iterable[Published]) -> str:
    """Add elements; fails, in the kernel, for a port that leads somewhere else."""
    return "".join(
        f"add element ip {config.table} {element}\n" for element in map(_element, published)
    )


def withdrawal(config: NetworkConfig, published: Iterable[Published]) -> str:
    """Remove elements, whether they are there or not."""
    # Deleting what is absent would fail the transaction, so each is added first.
    return "".join(
        f"add element ip {config.table} {element}\ndelete element ip {config.table} {element}\n"
        for element in map(_element, published)
    )


async def _apply(text: str) -> None:
    await run(["nft", "-f", "-"], text=text)


def _element(published: Published) -> str:
    port, address = published
    key = f"{port.protocol} . {port.host_port}"
    target = f"{address} . {port.container_port}"
    if port.host_ip == ANY_ADDRESS:
        return f"published {{ {key} : {target} }}"
    return f"published_at {{ {port.host_ip} . {key} : {target} }}"
