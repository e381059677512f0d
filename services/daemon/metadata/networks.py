"""Rows of endpoints, their published ports, and of addresses that rest.

An endpoint's row is written before the kernel has anything of it, and deleted last.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.common.frozen import frozen

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterable, Sequence

NETWORKS_DDL = """
-- places of containers in networks
CREATE TABLE endpoints (
    container_id TEXT PRIMARY KEY,
    network TEXT NOT NULL,
    address INTEGER NOT NULL,             -- IPv4, as a number
    netns_path TEXT NOT NULL,
    link TEXT NOT NULL UNIQUE,            -- the host's end
    created_at_ns INTEGER NOT NULL,
    UNIQUE (network, address)
) STRICT, WITHOUT ROWID;

-- ports of the host that lead to them
CREATE TABLE published_ports (
    protocol TEXT NOT NULL,               -- tcp or udp
    host_port INTEGER NOT NULL,
    host_ip TEXT NOT NULL,                -- 0.0.0.0: all
    container_port INTEGER NOT NULL,
    container_id TEXT NOT NULL REFERENCES endpoints (container_id) ON DELETE CASCADE,
    PRIMARY KEY (protocol, host_port, host_ip)
) STRICT, WITHOUT ROWID;
CREATE INDEX published_ports_container ON published_ports (container_id);

-- when an address was given back: it is not used again at once
CREATE TABLE released_addresses (
    network TEXT NOT NULL,
    address INTEGER NOT NULL,
    released_at_ns INTEGER NOT NULL,
    PRIMARY KEY (network, address)
) STRICT, WITHOUT ROWID;
"""


@frozen
class PortRow:
    """One published port; ``host_ip`` is never empty."""

    protocol: str
    host_port: int
    host_ip: str
    container_port: int


@frozen
class EndpointRow:
    """One endpoint as recorded."""

    container_id: str
    network: str
    address: int
    netns_path: str
    link: str
    created_at_ns: int
    ports: tuple[PortRow, ...] = ()


def insert(tx: sqlite3.Connection, row: EndpointRow) -> None:
    """Record an endpoint with its ports; nobody else may have its address or a port."""
    tx.execute(
        "INSERT INTO endpoints (container_id, network, address, netns_path, link, created_at_ns) "
        "VALUES (?, ?, ?, ?, ?, ?)",
        (
            row.container_id,
            row.network,
            row.address,
            row.netns_path,
            row.link,
            row.created_at_ns,
        ),
    )
    tx.executemany(
        "INSERT INTO published_ports (protocol, host_port, host_ip, container_port, container_id) "
        "VALUES (?, ?, ?, ?, ?)",
        [
            (port.protocol, port.host_port, port.host_ip, port.container_port, row.container_id)
            for port in row.ports
        ],
    )
    tx.execute(
        "DELETE FROM released_addresses WHERE network = ? AND address = ?",
        (row.network, row.address),
    )


def get(tx: sqlite3.Connection, container_id: str) -> EndpointRow | None:
    """One container's endpoint, or None."""
    found = _with_ports(
        tx, tx.execute("SELECT * FROM endpoints WHERE container_id = ?", (container_id,))
    )
    return found[0] if found else None


def list_all(tx: sqlite3.Connection, network: str) -> list[EndpointRow]:
    """All endpoints of a network, by address."""
    return _with_ports(
        tx, tx.execute("SELECT * FROM endpoints WHERE network = ? ORDER BY address", (network,))
    )


def addresses(tx: sqlite3.Connection, network: str) -> set[int]:
    """Addresses that are in use."""
    rows = tx.execute("SELECT address FROM endpoints WHERE network = ?", (network,))
    return {row[0] for row in rows}


def ports_on(tx: sqlite3.Connection, numbers: Sequence[int]) -> list[PortRow]:
    """What is published on these ports of the host, on any address, by any network."""
    marks = ", ".join("?" * len(numbers))
    rows = tx.execute(f"SELECT * FROM published_ports WHERE host_port IN ({marks})", numbers)
    return [_port(row) for row in rows]


def delete_ports(tx: sqlite3.Connection, container_id: str) -> None:
    """Forget what a container has published."""
    tx.execute("DELETE FROM published_ports WHERE container_id = ?", (container_id,))


def delete(tx: sqlite3.Connection, container_id: str, released_at_ns: int) -> None:
    """Forget an endpoint and note when its address was given back."""
    tx.execute(
        "INSERT OR REPLACE INTO released_addresses (network, address, released_at_ns) "
        "SELECT network, address, ? FROM endpoints WHERE container_id = ?",
        (released_at_ns, container_id),
    )
    tx.execute("DELETE FROM endpoints WHERE container_id = ?", (container_id,))


def released(tx: sqlite3.Connection, network: str, since_ns: int) -> dict[int, int]:
    """Addresses given back since a time, and when; older notes are thrown away."""
    tx.execute(
        "DELETE FROM released_addresses WHERE network = ? AND released_at_ns < ?",
        (network, since_ns),
    )
    rows = tx.execute(
        "SELECT address, released_at_ns FROM released_addresses WHERE network = ?", (network,)
    )
    return {row[0]: row[1] for row in rows}


def _with_ports(tx: sqlite3.Connection, found: Iterable[sqlite3.Row]) -> list[EndpointRow]:
    endpoints = []
    for row in found:
        ports = tx.execute(
            "SELECT * FROM published_ports WHERE container_id = ? "
            "ORDER BY container_port, protocol, host_ip",
            (row["container_id"],),
        )
        endpoints.append(EndpointRow(**dict(row), ports=tuple(_port(port) for port in ports)))
    return endpoints


def _port(row: sqlite3.Row) -> PortRow:
    return PortRow(
        protocol=row["protocol"],
        host_port=row["host_port"],
        host_ip=row["host_ip"],
        container_port=row["container_port"],
    )
