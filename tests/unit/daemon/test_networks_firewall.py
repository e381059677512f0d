from __future__ import annotations

import asyncio
from ipaddress import IPv4Address, IPv4Interface

import pytest

from services.common.errors import Internal
from services.daemon.networks import firewall
from services.daemon.networks.firewall import Table
from services.daemon.networks.network import NetworkConfig, PortMapping

CONFIG = NetworkConfig(bridge="br9", table="t9", gateway=IPv4Interface("10.9.0.1/24"))
ONE = (PortMapping(80, 8080, "0.0.0.0"), IPv4Address("10.9.0.2"))
TWO = (PortMapping(53, 5353, "127.0.0.1", "udp"), IPv4Address("10.9.0.3"))


def test_a_port_of_every_address_and_one_of_a_single_address_go_to_different_maps() -> None:
    assert firewall.addition(CONFIG, [ONE, TWO]) == (
        "add element ip t9 published { tcp . 8080 : 10.9.0.2 . 80 }\n"
        "add element ip t9 published_at { 127.0.0.1 . udp . 5353 : 10.9.0.3 . 53 }\n"
    )


def test_withdrawing_works_whether_the_element_is_there_or_not() -> None:
    element = "element ip t9 published { tcp . 8080 : 10.9.0.2 . 80 }\n"
    assert firewall.withdrawal(CONFIG, [ONE]) == f"add {element}delete {element}"


def test_the_ruleset_replaces_the_table_and_names_only_what_is_configured() -> None:
    text = firewall.ruleset(CONFIG, [ONE])
    assert text.startswith("add table ip t9\ndelete table ip t9\n")
    assert text.endswith("add element ip t9 published { tcp . 8080 : 10.9.0.2 . 80 }\n")
    assert "theseus" not in text
    assert 'iifname != { "br9", "lo" } ip daddr 10.9.0.0/24 ip daddr != 10.9.0.1 drop' in text


class FakeKernel:
    """Records transactions; each waits for a permit when it is told to, or fails."""

    def __init__(self) -> None:
        self.applied: list[str] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.failures = 0

    async def apply(self, text: str) -> None:
        await self.gate.wait()
        if self.failures:
            self.failures -= 1
            raise Internal("nft failed")
        self.applied.append(text)


@pytest.fixture
def kernel() -> FakeKernel:
    return FakeKernel()


async def nothing() -> list[firewall.Published]:
    return []


async def test_changes_that_wait_go_to_the_kernel_together(kernel: FakeKernel) -> None:
    table = Table(CONFIG, nothing, apply=kernel.apply)
    kernel.gate.clear()
    async with asyncio.TaskGroup() as group:
        first = group.create_task(table.publish([ONE]))
        await asyncio.sleep(0)
        others = [group.create_task(table.publish([TWO])) for _ in range(3)]
        await asyncio.sleep(0)
        assert not first.done()
        kernel.gate.set()
    assert all(task.done() for task in others)
    one = firewall.addition(CONFIG, [ONE])
    assert kernel.applied == [one, firewall.addition(CONFIG, [TWO]) * 3]


async def test_a_refused_change_has_the_whole_table_written(kernel: FakeKernel) -> None:
    async def recorded() -> list[firewall.Published]:
        return [ONE, TWO]

    kernel.failures = 1
    await Table(CONFIG, recorded, apply=kernel.apply).publish([TWO])
    assert kernel.applied == [firewall.ruleset(CONFIG, [ONE, TWO])]


async def test_after_a_failure_the_next_change_makes_up_for_it(kernel: FakeKernel) -> None:
    table = Table(CONFIG, nothing, apply=kernel.apply)
    kernel.failures = 2
    with pytest.raises(Internal):
        await table.publish([ONE])
    await table.withdraw([])
    assert kernel.applied == [firewall.ruleset(CONFIG, [])]
    await table.withdraw([])
    assert len(kernel.applied) == 1


async def test_a_cancelled_change_is_made_up_for(kernel: FakeKernel) -> None:
    table = Table(CONFIG, nothing, apply=kernel.apply)
    kernel.gate.clear()
    change = asyncio.create_task(table.publish([ONE]))
    await asyncio.sleep(0)
    change.cancel()
    with pytest.raises(asyncio.CancelledError):
        await change
    kernel.gate.set()
    await table.publish([TWO])
    assert kernel.applied == [firewall.ruleset(CONFIG, [])]
