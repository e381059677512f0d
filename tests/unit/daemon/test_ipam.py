from __future__ import annotations

from ipaddress import IPv4Address, IPv4Interface

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common.errors import ResourceExhausted
from services.daemon.networks.ipam import REST_NS, choose_address, mac_of

GATEWAY = IPv4Interface("10.9.0.1/29")  # .1 gateway, .2 to .6 for containers, .7 broadcast


def ip(text: str) -> int:
    return int(IPv4Address(text))


def choose(used=(), released=None, now_ns=10 * REST_NS) -> str:
    return str(choose_address(GATEWAY, used=used, released_at_ns=released or {}, now_ns=now_ns))


def test_the_lowest_free_address_is_chosen() -> None:
    assert choose() == "10.9.0.2"
    assert choose({ip("10.9.0.2"), ip("10.9.0.4")}) == "10.9.0.3"


def test_an_address_rests_before_it_is_used_again() -> None:
    now = 10 * REST_NS
    assert choose(released={ip("10.9.0.2"): now - 1}) == "10.9.0.3"
    assert choose(released={ip("10.9.0.2"): now - REST_NS}) == "10.9.0.2"


def test_the_longest_rested_one_is_used_when_there_is_no_other() -> None:
    now = 10 * REST_NS
    released = {ip("10.9.0.2"): now - 5, ip("10.9.0.3"): now - 9, ip("10.9.0.4"): now - 7}
    used = {ip("10.9.0.5"), ip("10.9.0.6")}
    assert choose(used, released) == "10.9.0.3"


def test_a_full_subnet_is_an_error_in_words() -> None:
    with pytest.raises(ResourceExhausted, match=r"no available IPv4 addresses .* 10\.9\.0\.0/29"):
        choose({ip(f"10.9.0.{number}") for number in range(2, 7)})


@given(st.sets(st.integers(2, 6), max_size=4))
def test_what_is_chosen_is_free_and_in_the_subnet(numbers: set[int]) -> None:
    used = {ip(f"10.9.0.{number}") for number in numbers}
    chosen = IPv4Address(choose(used))
    assert chosen in GATEWAY.network.hosts()
    assert chosen != GATEWAY.ip
    assert int(chosen) not in used


def test_the_hardware_address_follows_from_the_address() -> None:
    assert mac_of(IPv4Address("172.17.0.2")) == "02:42:ac:11:00:02"
