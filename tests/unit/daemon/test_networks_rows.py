from __future__ import annotations

import sqlite3
from typing import TYPE_CHECKING

import pytest

from services.daemon.metadata import networks as rows
from services.daemon.metadata.networks import NETWORKS_DDL, EndpointRow, PortRow

if TYPE_CHECKING:
    from collections.abc import Iterator

PORT = PortRow("tcp", 8080, "0.0.0.0", 80)


def endpoint(name: str, address: int, *ports: PortRow) -> EndpointRow:
    return EndpointRow(name, "bridge", address, f"/run/{name}", f"th-{name}", 7, ports)


@pytest.fixture
def tx() -> Iterator[sqlite3.Connection]:
    connection = sqlite3.connect(":memory:")
    connection.row_factory = sqlite3.Row
    connection.execute("PRAGMA foreign_keys=ON")
    connection.executescript(NETWORKS_DDL)
    yield connection
    connection.close()


def test_an_endpoint_comes_back_as_it_was_recorded(tx: sqlite3.Connection) -> None:
    one, two = endpoint("one", 12, PORT), endpoint("two", 11)
    rows.insert(tx, one)
    rows.insert(tx, two)
    assert rows.get(tx, "one") == one
    assert rows.get(tx, "three") is None
    assert rows.list_all(tx, "bridge") == [two, one]
    assert rows.list_all(tx, "other") == []
    assert rows.addresses(tx, "bridge") == {11, 12}
    assert rows.ports_on(tx, [8080, 9]) == [PORT]
    assert rows.ports_on(tx, []) == []


@pytest.mark.parametrize(
    "other", [endpoint("one", 13), endpoint("two", 12), endpoint("two", 13, PORT)]
)
def test_container_address_and_port_are_had_once(
    tx: sqlite3.Connection, other: EndpointRow
) -> None:
    rows.insert(tx, endpoint("one", 12, PORT))
    with pytest.raises(sqlite3.IntegrityError):
        rows.insert(tx, other)


def test_a_deleted_endpoint_leaves_only_when_its_address_was_released(
    tx: sqlite3.Connection,
) -> None:
    rows.insert(tx, endpoint("one", 12, PORT))
    rows.delete(tx, "one", 100)
    rows.delete(tx, "one", 200)
    assert rows.list_all(tx, "bridge") == []
    assert rows.ports_on(tx, [8080]) == []
    assert rows.released(tx, "bridge", 50) == {12: 100}
    assert rows.released(tx, "bridge", 101) == {}
    assert rows.released(tx, "bridge", 50) == {}


def test_an_address_that_is_used_again_does_not_rest(tx: sqlite3.Connection) -> None:
    rows.insert(tx, endpoint("one", 12))
    rows.delete(tx, "one", 100)
    rows.insert(tx, endpoint("two", 12))
    assert rows.released(tx, "bridge", 0) == {}


def test_ports_can_be_forgotten_before_the_endpoint(tx: sqlite3.Connection) -> None:
    rows.insert(tx, endpoint("one", 12, PORT))
    rows.delete_ports(tx, "one")
    assert rows.get(tx, "one") == endpoint("one", 12)
