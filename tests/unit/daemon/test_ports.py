from __future__ import annotations

import socket

import pytest

from services.common.errors import FailedPrecondition, InvalidArgument
from services.daemon.networks.network import PortMapping
from services.daemon.networks.ports import check_conflicts, normalize_ports, probe


def test_empty_fields_are_filled_in_and_doubles_dropped() -> None:
    wanted = [PortMapping(80, 8080, "", ""), PortMapping(80, 8080, "0.0.0.0", "TCP")]
    assert normalize_ports(wanted) == (PortMapping(80, 8080, "0.0.0.0", "tcp"),)


@pytest.mark.parametrize(
    ("port", "message"),
    [
        (PortMapping(0, 80), "invalid container port: 0"),
        (PortMapping(65536, 80), "invalid container port: 65536"),
        (PortMapping(80, 65536), "invalid host port: 65536"),
        (PortMapping(80, 80, "", "sctp"), "invalid proto: sctp"),
        (PortMapping(80, 80, "::1"), "invalid IP address: ::1"),
        (PortMapping(80, 80, "x; flush ruleset"), "invalid IP address"),
    ],
)
def test_bad_mappings_are_refused(port: PortMapping, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message) as refused:
        normalize_ports([port])
    assert refused.value.field == "ports"


ANY = "0.0.0.0"


@pytest.mark.parametrize(
    ("wanted", "published", "conflict"),
    [
        (PortMapping(80, 8080, ANY), PortMapping(81, 8080, ANY), True),
        (PortMapping(80, 8080, "127.0.0.1"), PortMapping(81, 8080, ANY), True),
        (PortMapping(80, 8080, ANY), PortMapping(81, 8080, "127.0.0.1"), True),
        (PortMapping(80, 8080, "10.0.0.1"), PortMapping(81, 8080, "127.0.0.1"), False),
        (PortMapping(80, 8080, ANY, "udp"), PortMapping(80, 8080, ANY, "tcp"), False),
        (PortMapping(80, 8081, ANY), PortMapping(80, 8080, ANY), False),
    ],
)
def test_conflicts(wanted: PortMapping, published: PortMapping, conflict: bool) -> None:
    if not conflict:
        check_conflicts([wanted], [published])
        return
    with pytest.raises(FailedPrecondition) as refused:
        check_conflicts([wanted], [published])
    assert refused.value.message == (
        f"Bind for {wanted.host_ip}:8080 failed: port is already allocated"
    )


def test_mappings_of_one_container_conflict_too() -> None:
    with pytest.raises(FailedPrecondition):
        check_conflicts([PortMapping(80, 8080, ANY), PortMapping(81, 8080, ANY)], [])


def test_probe_sees_a_listening_program() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(FailedPrecondition) as refused:
            probe(PortMapping(80, port, "127.0.0.1"))
        assert refused.value.message == (
            f"failed to bind host port 127.0.0.1:{port}/tcp: address already in use"
        )
    assert probe(PortMapping(80, port, "127.0.0.1")).host_port == port


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_probe_picks_a_port(protocol: str) -> None:
    picked = probe(PortMapping(80, 0, "127.0.0.1", protocol))
    assert 0 < picked.host_port < 65536
    assert picked.container_port == 80


def test_probe_refuses_an_address_of_somebody_else() -> None:
    with pytest.raises(FailedPrecondition, match="cannot assign requested address"):
        probe(PortMapping(80, 0, "192.0.2.77"))
