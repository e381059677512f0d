"""The bridge network: one Linux bridge, a veth pair for each container, rules in one nft table.

The bridge and the rules are made when the first container needs them. Steps of attach, in order:
row, bridge, namespace and link, published ports; of detach: ports, row, namespace (its link goes
with it). A crash leaves a row, by which :meth:`restore` takes the endpoint away or completes it, or
a namespace that has none, which it sweeps away. An address that was given back rests, so that the
link which lingers does not meet another of the same address.

``_setup`` guards the making and removing of bridge and table; the table's own lock is taken inside.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from functools import partial
from ipaddress import IPv4Address
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from services.common.errors import (
    AlreadyExists,
    FailedPrecondition,
    Internal,
    ResourceExhausted,
    TheseusError,
)
from services.daemon.metadata import networks as rows
from services.daemon.networks import conntrack, ipam, links, netns
from services.daemon.networks.firewall import Table
from services.daemon.networks.network import Endpoint, PortMapping
from services.daemon.networks.ports import PortInUse, check_conflicts, normalize_ports, probe
from services.daemon.together import both

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Awaitable, Callable, Collection, Sequence

    from services.common.database import Database
    from services.daemon.networks.firewall import Published
    from services.daemon.networks.network import NetworkConfig

log = structlog.get_logger(__name__)

_PICK_ATTEMPTS = 16
_UNDO_TIMEOUT_S = 60


class BridgeNetwork:
    """A :class:`~services.daemon.networks.network.Network` on a bridge of this host.

    Args:
        db: has the tables of :mod:`services.daemon.metadata.networks`.
        config: of this network.
        trace: called with a step's name when the step is done, for tests of crashes.
    """

    def __init__(
        self, db: Database, config: NetworkConfig, *, trace: Callable[[str], None] | None = None
    ) -> None:
        self.config = config
        self._db = db
        self._trace = trace or (lambda _step: None)
        self._setup = asyncio.Lock()
        self._table = Table(config, self._recorded)
        self._ready = False  # guarded by _setup
        self._mtu = config.mtu

    async def attach(
        self,
        container_id: str,
        netns_path: Path,
        ports: Sequence[PortMapping] = (),
        *,
        chosen: Callable[[Endpoint], Awaitable[object]] | None = None,
    ) -> Endpoint:
        """See :meth:`Network.attach`."""
        endpoint = await self._record(container_id, netns_path, normalize_ports(ports))
        async with AsyncExitStack() as undo:
            undo.push_async_callback(self._undo, container_id)
            self._trace("recorded")
            work = self._make(endpoint)
            await (work if chosen is None else both(work, chosen(endpoint)))
            undo.pop_all()
        log.info("endpoint attached", container_id=container_id, address=str(endpoint.ip))
        return endpoint

    async def detach(
        self, container_id: str, *, given_back: Callable[[], Awaitable[object]] | None = None
    ) -> None:
        """See :meth:`Network.detach`."""
        row = self._db.look(partial(rows.get, container_id=container_id))
        if row is None:
            if given_back is not None:
                await given_back()
            path = self.config.netns_directory / container_id
            if netns.exists(path):  # that detach was cut off after its row had gone
                await netns.delete_netns(path)
            return
        endpoint = self._endpoint(row)
        await self._withdraw(endpoint)
        self._trace("withdrawn")
        forgotten = self._db.write(
            partial(rows.delete, container_id=container_id, released_at_ns=time.time_ns())
        )
        # Two records, in whichever order they get to the disk: without a row there is nothing to
        # detach, and what is detached is not on the container's record for long.
        await (forgotten if given_back is None else both(forgotten, given_back()))
        self._trace("forgotten")
        await netns.delete_netns(endpoint.netns_path)
        log.info("endpoint detached", container_id=container_id, address=str(endpoint.ip))

    async def endpoint(self, container_id: str) -> Endpoint | None:
        """See :meth:`Network.endpoint`."""
        row = await self._db.read(partial(rows.get, container_id=container_id))
        return None if row is None else self._endpoint(row)

    async def endpoints(self) -> list[Endpoint]:
        """See :meth:`Network.endpoints`."""
        found = await self._db.read(partial(rows.list_all, network=self.config.name))
        return [self._endpoint(row) for row in found]

    async def restore(self, containers: Collection[str]) -> None:
        """See :meth:`Network.restore`."""
        kept = []
        for endpoint in await self.endpoints():
            # After a reboot the namespace is gone, and so is whatever ran in it.
            if endpoint.container_id in containers and netns.exists(endpoint.netns_path):
                kept.append(endpoint)
            else:
                await self.detach(endpoint.container_id)
        await self._sweep_namespaces({endpoint.netns_path for endpoint in kept}, containers)
        async with self._setup:
            if kept:
                await self._build()
            else:
                await self._table.remove()
            await self._repair(kept)

    async def teardown_if_unused(self) -> bool:
        """See :meth:`Network.teardown_if_unused`."""
        async with self._setup:
            if await self._db.read(partial(rows.addresses, network=self.config.name)):
                return False
            await self._table.remove()
            await links.delete(self.config.bridge)
            self._ready = False
        log.info("network torn down", network=self.config.name, bridge=self.config.bridge)
        return True

    async def _make(self, endpoint: Endpoint) -> None:
        await self._ensure()
        await self._connect(endpoint)
        self._trace("connected")
        if endpoint.ports:
            await self._publish(endpoint)
        self._trace("published")

    async def _record(
        self, container_id: str, netns_path: Path, wanted: tuple[PortMapping, ...]
    ) -> Endpoint:
        """Write the row: address and ports are chosen inside the transaction."""
        fixed = tuple(port for port in wanted if port.host_port)
        for _ in range(_PICK_ATTEMPTS):
            bound = tuple(probe(port) for port in wanted)
            row = await self._db.write(
                partial(
                    self._insert,
                    container_id=container_id,
                    netns_path=netns_path,
                    fixed=fixed,
                    bound=bound,
                )
            )
            if row is not None:
                return self._endpoint(row)
        raise ResourceExhausted("all ports are allocated", resource=("network", self.config.name))

    def _insert(
        self,
        tx: sqlite3.Connection,
        *,
        container_id: str,
        netns_path: Path,
        fixed: tuple[PortMapping, ...],
        bound: tuple[PortMapping, ...],
    ) -> rows.EndpointRow | None:
        """None when a port that was picked is published meanwhile: pick again."""
        network = self.config.name
        if rows.get(tx, container_id) is not None:
            raise AlreadyExists(
                f"container {container_id} is attached to network {network} already",
                resource=("endpoint", container_id),
            )
        published = [_mapping(row) for row in rows.ports_on(tx, [port.host_port for port in bound])]
        check_conflicts(fixed, published)
        try:
            check_conflicts(bound, published)
        except PortInUse:
            return None
        now_ns = time.time_ns()
        address = ipam.choose_address(
            self.config.gateway,
            used=rows.addresses(tx, network),
            released_at_ns=rows.released(tx, network, now_ns - ipam.REST_NS),
            now_ns=now_ns,
        )
        row = rows.EndpointRow(
            container_id=container_id,
            network=network,
            address=int(address),
            netns_path=str(netns_path),
            link=links.link_name(self.config.bridge, container_id, now_ns),
            created_at_ns=now_ns,
            ports=tuple(
                rows.PortRow(port.protocol, port.host_port, port.host_ip, port.container_port)
                for port in bound
            ),
        )
        rows.insert(tx, row)
        return row

    async def _ensure(self) -> None:
        async with self._setup:
            if not self._ready or not links.exists(self.config.bridge):
                await self._build()

    async def _build(self) -> None:
        """Make bridge and table, or make them right. The caller holds ``_setup``."""
        config = self.config
        if not links.exists(config.bridge):
            self._check_overlap()
        self._mtu = config.mtu or links.default_mtu()
        await links.make_bridge(config, self._mtu)
        await asyncio.to_thread(links.allow_forwarding, config.bridge)
        await self._table.rebuild()
        self._ready = True
        log.info("network ready", network=config.name, bridge=config.bridge)

    def _check_overlap(self) -> None:
        subnet = self.config.gateway.network
        for link, network in links.routes():
            if link != self.config.bridge and network.prefixlen and network.overlaps(subnet):
                raise FailedPrecondition(
                    f"subnet {subnet} of network {self.config.name} overlaps with the route to "
                    f"{network} on {link}: configure another one"
                )

    async def _recorded(self) -> list[Published]:
        return [pair for endpoint in await self.endpoints() for pair in _published(endpoint)]

    async def _publish(self, endpoint: Endpoint) -> None:
        await self._table.publish(_published(endpoint))
        await asyncio.to_thread(conntrack.forget_udp, ports=_udp_ports(endpoint))

    async def _withdraw(self, endpoint: Endpoint) -> None:
        forget = partial(rows.delete_ports, container_id=endpoint.container_id)
        try:
            if endpoint.ports:
                await self._db.write(forget)
            await self._table.withdraw(_published(endpoint))
        except BaseException:
            self._table.distrust()
            raise
        if _udp_ports(endpoint):
            await asyncio.to_thread(conntrack.forget_udp, address=endpoint.ip)

    async def _connect(self, endpoint: Endpoint) -> None:
        make = partial(links.make_container_side, endpoint, self._mtu)
        await netns.inside(endpoint.netns_path, make)
        self._trace("linked")
        await links.plug(self.config, endpoint.link, hairpin=bool(endpoint.ports))

    async def _repair(self, kept: Sequence[Endpoint]) -> None:
        """Make links that are missing, delete those that nobody knows."""
        if not links.exists(self.config.bridge):
            return
        plugged = await links.plugged(self.config.bridge)
        for stray in plugged - {endpoint.link for endpoint in kept}:
            log.info("unknown link deleted", link=stray)
            await links.delete(stray)
        for endpoint in kept:
            if endpoint.link in plugged:
                continue
            log.info("endpoint repaired", container_id=endpoint.container_id)
            try:
                if links.exists(endpoint.link):
                    await links.plug(self.config, endpoint.link, hairpin=bool(endpoint.ports))
                else:
                    await self._connect(endpoint)
            except Internal as error:
                log.error(
                    "endpoint cannot be repaired",
                    container_id=endpoint.container_id,
                    error=error.message,
                )

    async def _sweep_namespaces(self, kept: set[Path], containers: Collection[str]) -> None:
        directory = self.config.netns_directory
        if not directory.is_dir():
            return
        for path in sorted(directory.iterdir()):
            if path not in kept and path.name not in containers:
                log.info("unknown network namespace deleted", path=str(path))
                await netns.delete_netns(path)

    async def _undo(self, container_id: str) -> None:
        try:
            async with asyncio.timeout(_UNDO_TIMEOUT_S):
                await asyncio.shield(self.detach(container_id))
        except (TheseusError, OSError, TimeoutError) as error:
            # The row stays: restore() comes back to it.
            log.error("endpoint is left half attached", container_id=container_id, error=str(error))

    def _endpoint(self, row: rows.EndpointRow) -> Endpoint:
        address = IPv4Address(row.address)
        return Endpoint(
            container_id=row.container_id,
            network=row.network,
            ip=address,
            prefix_length=self.config.gateway.network.prefixlen,
            gateway=self.config.gateway.ip,
            mac=ipam.mac_of(address),
            link=row.link,
            netns_path=Path(row.netns_path),
            ports=tuple(_mapping(port) for port in row.ports),
        )


def _published(endpoint: Endpoint) -> list[Published]:
    return [(port, endpoint.ip) for port in endpoint.ports]


def _udp_ports(endpoint: Endpoint) -> frozenset[int]:
    return frozenset(port.host_port for port in endpoint.ports if port.protocol == "udp")


def _mapping(row: rows.PortRow) -> PortMapping:
    return PortMapping(
        container_port=row.container_port,
        host_port=row.host_port,
        host_ip=row.host_ip,
        protocol=row.protocol,
    )
