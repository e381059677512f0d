"""The bridge network on a real kernel, inside a network namespace that stands for the host.

Each test runs one scenario of this file in a child under ``ip netns exec``, so that the machine's
own network is never touched. Inside, "the host" is that namespace; ``outer`` is a machine beyond
it, at 192.0.2.2, that the host reaches as 192.0.2.1.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import socket
import subprocess
import sys
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from ipaddress import IPv4Interface
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from services.common.database import Database
from services.common.errors import AlreadyExists, FailedPrecondition, Internal
from services.daemon.metadata.networks import NETWORKS_DDL
from services.daemon.networks import links, netns
from services.daemon.networks.bridge import BridgeNetwork
from services.daemon.networks.network import NetworkConfig, PortMapping

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]

ROOT = Path(__file__).parents[2]
HOST, OUTER = "192.0.2.1", "192.0.2.2"
CRASH_STATUS = 9
HERE = Path("/proc/thread-self/ns/net")  # the namespace of the thread that looks

# Answers every peer with "<name> <address of the peer>"; says so when it listens.
SERVER = """
import socket, sys
kind, port, name = sys.argv[1], int(sys.argv[2]), sys.argv[3]
s = socket.socket(socket.AF_INET, socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM)
s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
s.bind(("0.0.0.0", port))
if kind == "tcp":
    s.listen()
print("ready", flush=True)
while True:
    if kind == "tcp":
        c, peer = s.accept()
        c.sendall(f"{name} {peer[0]}".encode())
        c.close()
    else:
        data, peer = s.recvfrom(100)
        s.sendto(f"{name} {peer[0]}".encode(), peer)
"""

CLIENT = """
import socket, sys
address, port = sys.argv[1], int(sys.argv[2])
s = socket.create_connection((address, port), timeout=float(sys.argv[3]))
print(s.recv(100).decode())
"""


@pytest.fixture
def host_netns() -> Iterator[str]:
    name = f"thtest-{secrets.token_hex(4)}"
    was_mounted = _is_mounted("/run/netns")
    subprocess.run(["ip", "netns", "add", name], check=True)
    yield name
    subprocess.run(["ip", "netns", "delete", name], check=True)
    if not was_mounted:  # ip made it a mount of its own, and leaves that
        subprocess.run(["umount", "/run/netns"], check=True)


def _is_mounted(path: str) -> bool:
    return f" {path} " in Path("/proc/self/mountinfo").read_text()


SCENARIOS: dict[str, Callable[[Path], object]] = {}


def scenario(function):
    SCENARIOS[function.__name__] = function
    return function


@dataclass
class Lab:
    """What a scenario has at hand."""

    directory: Path
    db: Database
    network: BridgeNetwork
    stack: AsyncExitStack

    def netns(self, name: str) -> Path:
        return self.network.config.netns_directory / name

    async def attach(self, name: str, *ports: PortMapping):
        return await self.network.attach(name, self.netns(name), ports)

    async def serve(
        self, where: Path | None, port: int, name: str, kind: str = "tcp"
    ) -> asyncio.subprocess.Process:
        command = [sys.executable, "-S", "-c", SERVER, kind, str(port), name]
        if where is not None:
            command = ["nsenter", f"--net={where}", *command]
        server = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        self.stack.push_async_callback(stop, server)
        assert server.stdout is not None
        assert await server.stdout.readline() == b"ready\n"
        return server

    async def outer(self) -> Path:
        """Build the machine beyond the host."""
        path = self.directory / "outer"
        await netns.inside(
            path,
            lambda: batch(
                f"link add name up0 type veth peer name uplink netns {os.getpid()}\n"
                f"link set up0 up\naddr add {OUTER}/24 dev up0\n"
                f"route add default via {HOST}\n"
            ),
        )
        self.stack.push_async_callback(netns.delete_netns, path)
        sh("ip", "addr", "add", f"{HOST}/24", "dev", "uplink")
        sh("ip", "link", "set", "uplink", "up")
        return path


async def stop(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.kill()
    await process.wait()


@asynccontextmanager
async def lab(directory: Path) -> AsyncIterator[Lab]:
    sh("ip", "link", "set", "lo", "up")
    config = make_config(directory)
    db = Database(directory / "daemon.db")
    db.open([NETWORKS_DDL])
    async with AsyncExitStack() as stack:
        stack.callback(db.close)
        yield Lab(directory, db, BridgeNetwork(db, config), stack)


def make_config(directory: Path) -> NetworkConfig:
    return NetworkConfig(
        netns_directory=directory / "netns",
        bridge="thtest0",
        table="thtest",
        gateway=IPv4Interface("10.99.0.1/16"),
    )


def sh(*argv: str) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout


def batch(commands: str) -> None:
    subprocess.run(["ip", "-batch", "-"], input=commands, check=True, text=True)


def ask(address: str, port: int, *, where: Path | None = None, timeout_s: float = 5) -> str:
    """What the server says to a TCP connection made in a namespace; "" when there is none."""
    command = [sys.executable, "-S", "-c", CLIENT, address, str(port), str(timeout_s)]
    if where is not None:
        command = ["nsenter", f"--net={where}", *command]
    return subprocess.run(command, check=False, capture_output=True, text=True).stdout.strip()


def ask_udp(client: socket.socket, address: str, port: int) -> str:
    client.sendto(b"?", (address, port))
    return client.recv(100).decode()


def udp_client(timeout_s: float = 5) -> socket.socket:
    client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    client.settimeout(timeout_s)
    return client


async def wait_gone(*names: str) -> None:
    """Wait for links to vanish: the kernel says so on a netlink socket."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as watching:
        watching.bind((0, 1))  # RTMGRP_LINK
        watching.settimeout(20)
        while any(links.exists(name) for name in names):
            watching.recv(65536)


def published_elements() -> list[object]:
    found = []
    for name in ("published", "published_at"):
        listed = json.loads(sh("nft", "-j", "list", "map", "ip", "thtest", name))
        found += [e for item in listed["nftables"] for e in item.get("map", {}).get("elem", [])]
    return found


def tables() -> str:
    return sh("nft", "list", "tables")


def bridge_filters() -> Iterator[str]:
    """Set, one after the other, whether bridged frames pass the rules; once without the module."""
    switch = Path("/proc/sys/net/bridge/bridge-nf-call-iptables")
    if not switch.exists():
        yield "absent"
        return
    for value in ("0", "1"):
        switch.write_text(value)
        yield value


@scenario
async def containers_reach_one_another_and_the_gateway(directory: Path) -> None:
    async with lab(directory) as it:
        one, two = await it.attach("one"), await it.attach("two")
        assert (str(one.ip), str(two.ip)) == ("10.99.0.2", "10.99.0.3")
        assert one.mac == "02:42:0a:63:00:02"
        await it.serve(two.netns_path, 80, "two")
        await it.serve(None, 9000, "host")
        assert ask(str(two.ip), 80, where=one.netns_path) == f"two {one.ip}"
        assert ask(str(one.gateway), 9000, where=one.netns_path) == f"host {one.ip}"
        assert ask("127.0.0.1", 80, where=two.netns_path) == "two 127.0.0.1"
        assert await it.network.endpoints() == [one, two]
        mac = sh("nsenter", f"--net={one.netns_path}", "ip", "-br", "link", "show", "eth0")
        assert one.mac in mac


@scenario
async def published_ports_lead_to_the_container(directory: Path) -> None:
    async with lab(directory) as it:
        outer = await it.outer()
        one = await it.attach(
            "one",
            PortMapping(80, 8080),
            PortMapping(80, 8081, "127.0.0.1"),
            PortMapping(80),
        )
        two = await it.attach("two")
        await it.serve(one.netns_path, 80, "one")
        picked = next(port.host_port for port in one.ports if port.host_port not in (8080, 8081))
        gateway = str(one.gateway)
        for bridge_filter in bridge_filters():
            for port in (8080, 8081, picked):
                assert ask("127.0.0.1", port) == f"one {gateway}", bridge_filter
            assert ask(gateway, 8080) == f"one {gateway}"
            assert ask(HOST, 8080) == f"one {HOST}"
            assert ask(gateway, 8080, where=two.netns_path) == f"one {gateway}"
            assert ask(gateway, 8080, where=one.netns_path) == f"one {gateway}"
            assert ask(HOST, 8080, where=outer) == f"one {OUTER}"


@scenario
async def what_is_not_published_is_closed_to_others(directory: Path) -> None:
    async with lab(directory) as it:
        outer = await it.outer()
        one = await it.attach("one", PortMapping(80, 8081, "127.0.0.1"))
        await it.serve(one.netns_path, 80, "one")
        await it.serve(None, 7000, "host")
        await it.serve(outer, 90, "outer")
        assert ask(str(one.ip), 80) != ""
        assert ask(str(one.ip), 80, where=outer, timeout_s=0.3) == ""
        assert ask(HOST, 8081, where=outer, timeout_s=0.3) == ""
        sh("nsenter", f"--net={outer}", "ip", "route", "add", "127.9.0.0/16", "via", HOST)
        sh("nsenter", f"--net={outer}", "sysctl", "-qw", "net.ipv4.conf.all.route_localnet=1")
        assert ask("127.9.0.1", 8081, where=outer, timeout_s=0.3) == ""
        # The bridge lets loopback addresses be routed; containers must not profit from it.
        inside = ("nsenter", f"--net={one.netns_path}")
        sh(*inside, "ip", "route", "add", "127.8.0.0/16", "via", str(one.gateway))
        sh(*inside, "sysctl", "-qw", "net.ipv4.conf.all.route_localnet=1")
        assert ask("127.8.0.1", 7000) == "host 127.0.0.1"
        assert ask("127.8.0.1", 7000, where=one.netns_path, timeout_s=0.3) == ""
        # Out of the container, with the host's address.
        assert ask(OUTER, 90, where=one.netns_path) == f"outer {HOST}"


@scenario
async def ports_in_use_are_refused(directory: Path) -> None:
    async with lab(directory) as it:
        await it.attach("one", PortMapping(80, 8080), PortMapping(80, 7070, "127.0.0.1"))
        for taken in (PortMapping(81, 8080), PortMapping(81, 8080, "127.0.0.1")):
            with pytest.raises(FailedPrecondition) as refused:
                await it.attach("two", taken)
            assert refused.value.message.endswith(":8080 failed: port is already allocated")
        with socket.create_server(("127.0.0.1", 9090)):
            with pytest.raises(FailedPrecondition) as refused:
                await it.attach("two", PortMapping(80, 9090))
            assert refused.value.message == (
                "failed to bind host port 0.0.0.0:9090/tcp: address already in use"
            )
        with pytest.raises(AlreadyExists):
            await it.attach("one")
        assert [endpoint.container_id for endpoint in await it.network.endpoints()] == ["one"]
        assert not it.netns("two").exists()
        # Another address, or another protocol, is another port.
        await it.attach("two", PortMapping(80, 7070, "10.99.0.1"), PortMapping(80, 8080, "", "udp"))
        await it.network.detach("one")
        await it.attach("three", PortMapping(81, 8080))


@scenario
async def detach_leaves_nothing(directory: Path) -> None:
    async with lab(directory) as it:
        one = await it.attach("one", PortMapping(80, 8080), PortMapping(53, 53, "127.0.0.1", "udp"))
        assert len(published_elements()) == 2
        assert not await it.network.teardown_if_unused()
        await it.network.detach("one")
        await it.network.detach("one")
        assert published_elements() == []
        assert list(it.network.config.netns_directory.iterdir()) == []
        assert await it.network.endpoint("one") is None
        await wait_gone(one.link)
        again = await it.attach("one")
        assert again.ip != one.ip  # the old one rests
        assert again.link != one.link
        await it.network.detach("one")
        assert await it.network.teardown_if_unused()
        assert not links.exists("thtest0")
        assert tables() == ""
        assert (await it.attach("two")).ip not in (one.ip, again.ip)


@scenario
async def udp_flows_follow_the_published_port(directory: Path) -> None:
    async with lab(directory) as it:
        with udp_client() as client:
            client.bind(("127.0.0.1", 0))
            # The flow begins before anybody answers: it must not stay with the host.
            await it.attach("first")
            client.sendto(b"?", ("127.0.0.1", 4001))
            one = await it.attach("one", PortMapping(53, 4001, "", "udp"))
            await it.serve(one.netns_path, 53, "one", "udp")
            assert ask_udp(client, "127.0.0.1", 4001) == "one 10.99.0.1"
            await it.network.detach("one")
            host = await it.serve(None, 4001, "host", "udp")
            assert ask_udp(client, "127.0.0.1", 4001) == "host 127.0.0.1"
            await stop(host)
            two = await it.attach("two", PortMapping(53, 4001, "", "udp"))
            await it.serve(two.netns_path, 53, "two", "udp")
            assert ask_udp(client, "127.0.0.1", 4001) == "two 10.99.0.1"


@scenario
async def a_failed_attach_leaves_nothing(directory: Path) -> None:
    async with lab(directory) as it:
        await it.attach("one")
        path = it.netns("two")
        await netns.inside(path, lambda: batch("link add name eth0 type bridge\n"))
        with pytest.raises(Internal, match="exists"):
            await it.attach("two", PortMapping(80, 8080))
        assert await it.network.endpoint("two") is None
        assert not path.exists()
        assert published_elements() == []
        assert len(await links.plugged("thtest0")) == 1


@scenario
async def a_namespace_is_entered_by_a_thread_of_its_own(directory: Path) -> None:
    path = directory / "one"
    here = HERE.stat().st_ino
    seen = []
    for _ in range(2):  # made, then entered
        await netns.inside(path, lambda: seen.append(HERE.stat().st_ino))
    assert seen[0] == seen[1] == path.stat().st_ino != here
    assert HERE.stat().st_ino == here
    for _ in range(8):
        there = await asyncio.to_thread(HERE.stat)
        assert there.st_ino == here
    (directory / "file").touch()
    with pytest.raises(Internal, match="cannot make network namespace"):
        await netns.inside(directory / "file" / "two", lambda: None)
    await netns.delete_netns(path)
    assert not path.exists()


@scenario
async def the_links_are_as_they_were_asked_for(directory: Path) -> None:
    async with lab(directory) as it:
        one = await it.attach("one", PortMapping(80, 8080))
        two = await it.attach("two")
        inside = ["nsenter", f"--net={one.netns_path}", "ip", "-json", "-details"]
        lo, eth0 = json.loads(sh(*inside, "addr"))
        assert "UP" in lo["flags"]
        assert {"UP", "LOWER_UP"} <= set(eth0["flags"])
        assert (eth0["ifname"], eth0["address"], eth0["mtu"]) == ("eth0", one.mac, 1500)
        (address,) = eth0["addr_info"]  # and none of IPv6
        assert (address["local"], address["prefixlen"]) == (str(one.ip), one.prefix_length)
        assert address["broadcast"] == str(it.network.config.gateway.network.broadcast_address)
        (default,) = (r for r in json.loads(sh(*inside, "route")) if r["dst"] == "default")
        assert (default["gateway"], default["dev"]) == (str(one.gateway), "eth0")
        for endpoint, hairpin in ((one, True), (two, False)):
            (host,) = json.loads(sh("ip", "-json", "-details", "addr", "show", endpoint.link))
            assert (host["master"], host["addr_info"]) == (it.network.config.bridge, [])
            assert host["linkinfo"]["info_slave_data"]["hairpin"] is hairpin


@scenario
async def a_cancelled_attach_leaves_nothing(directory: Path) -> None:
    async with lab(directory) as it:
        for step in ("recorded", "linked", "connected"):

            def trace(done: str, step: str = step) -> None:
                attaching = asyncio.current_task()
                if done == step and attaching is not None:
                    attaching.cancel()

            network = BridgeNetwork(it.db, it.network.config, trace=trace)
            ports = [PortMapping(80, 8080)]
            with pytest.raises(asyncio.CancelledError):
                await asyncio.create_task(network.attach("one", it.netns("one"), ports))
            assert await network.endpoint("one") is None
            assert list(directory.glob("netns/*")) == []
            assert await network.teardown_if_unused()


@scenario
async def restore_finishes_an_interrupted_attach(directory: Path) -> None:
    for step in ("recorded", "linked", "connected", "published"):
        for known in (True, False):
            place = directory / f"{step}-{known}"
            place.mkdir()
            await crash(place, "attach", step)
            async with lab(place) as it:
                await it.network.restore(["one"] if known else [])
                endpoint = await it.network.endpoint("one")
                # Without a namespace nothing can run in it yet: the start begins anew.
                assert (endpoint is not None) == (known and step != "recorded"), (step, known)
                if endpoint is not None:
                    await it.serve(endpoint.netns_path, 80, "one")
                    assert ask("127.0.0.1", 8080) == "one 10.99.0.1"
                    await it.network.detach("one")
                assert list(directory.glob("*/netns/*")) == []
                assert await it.network.teardown_if_unused()
                assert tables() == ""


@scenario
async def restore_finishes_an_interrupted_detach(directory: Path) -> None:
    for step, known in product(("withdrawn", "forgotten"), (True, False)):
        place = directory / f"{step}-{known}"
        place.mkdir()
        await crash(place, "detach", step)
        async with lab(place) as it:
            assert (await it.network.endpoint("one") is None) == (step == "forgotten")
            assert netns.exists(it.netns("one"))
            if known:  # its container is cleaned up once more
                await it.network.restore(["one"])
                await it.network.detach("one")
            await it.network.restore([])
            assert await it.network.endpoint("one") is None
            assert list(directory.glob("*/netns/*")) == []
            assert await it.network.teardown_if_unused()


@scenario
async def restore_makes_what_is_missing(directory: Path) -> None:
    async with lab(directory) as it:
        one = await it.attach("one", PortMapping(80, 8080))
        await it.attach("gone", PortMapping(80, 9090))
        await it.serve(one.netns_path, 80, "one")
        await netns.inside(it.netns("stranger"), lambda: None)
        await netns.inside(it.netns("unattached"), lambda: None)
        sh("nft", "flush", "ruleset")
        sh("ip", "link", "delete", "thtest0")
        assert ask("127.0.0.1", 8080, timeout_s=0.3) == ""
        after = BridgeNetwork(it.db, it.network.config)
        await after.restore(["one", "unattached"])
        assert ask("127.0.0.1", 8080) == "one 10.99.0.1"
        assert len(published_elements()) == 1
        assert sorted(path.name for path in it.netns("").iterdir()) == ["one", "unattached"]
        # The link alone, as after an `ip link delete` by hand.
        sh("ip", "link", "delete", one.link)
        await after.restore(["one", "unattached"])
        assert ask("127.0.0.1", 8080) == "one 10.99.0.1"


@scenario
async def rules_that_were_flushed_come_back_with_the_next_change(directory: Path) -> None:
    async with lab(directory) as it:
        one = await it.attach("one", PortMapping(80, 8080))
        await it.serve(one.netns_path, 80, "one")
        sh("nft", "flush", "ruleset")
        await it.attach("two", PortMapping(80, 9090))
        assert ask("127.0.0.1", 8080) == "one 10.99.0.1"
        sh("nft", "flush", "ruleset")
        await it.network.detach("two")
        assert ask("127.0.0.1", 8080) == "one 10.99.0.1"
        assert len(published_elements()) == 1


@scenario
async def many_at_once_get_their_own(directory: Path) -> None:
    async with lab(directory) as it:
        names = [f"c{number}" for number in range(12)]
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(it.attach(name, PortMapping(80))) for name in names]
        endpoints = [task.result() for task in tasks]
        assert len({endpoint.ip for endpoint in endpoints}) == len(names)
        assert len({endpoint.ports[0].host_port for endpoint in endpoints}) == len(names)
        assert len(published_elements()) == len(names)
        assert len(await links.plugged("thtest0")) == len(names)
        async with asyncio.TaskGroup() as group:
            for name in names:
                group.create_task(it.network.detach(name))
        assert published_elements() == []
        await wait_gone(*(endpoint.link for endpoint in endpoints))


@scenario
async def a_subnet_in_use_is_refused(directory: Path) -> None:
    async with lab(directory) as it:
        sh("ip", "link", "add", "other", "type", "bridge")
        sh("ip", "addr", "add", "10.99.7.1/24", "dev", "other")
        sh("ip", "link", "set", "other", "up")
        with pytest.raises(FailedPrecondition, match=r"overlaps with the route to 10\.99\.7\.0/24"):
            await it.attach("one")
        assert await it.network.endpoints() == []


async def crash(directory: Path, action: str, step: str) -> None:
    """Run ``action`` in a process that ends, as by SIGKILL, right after ``step``."""
    child = await asyncio.create_subprocess_exec(
        sys.executable, __file__, "crash", str(directory), action, step
    )
    assert await child.wait() == CRASH_STATUS, (action, step)


async def crashing(directory: Path, action: str, step: str) -> None:
    armed = action == "attach"

    def trace(done: str) -> None:
        if armed and done == step:
            os._exit(CRASH_STATUS)

    async with lab(directory) as it:
        network = BridgeNetwork(it.db, it.network.config, trace=trace)
        await network.attach("one", it.netns("one"), [PortMapping(80, 8080)])
        armed = True
        await network.detach("one")


@pytest.mark.parametrize("name", SCENARIOS)
def test_bridge_network(name: str, host_netns: str, tmp_path: Path) -> None:
    done = subprocess.run(
        ["ip", "netns", "exec", host_netns, sys.executable, __file__, name, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


if __name__ == "__main__":
    _name, _directory, *_rest = sys.argv[1:]
    if _name == "crash":
        asyncio.run(crashing(Path(_directory), *_rest))
    else:
        asyncio.run(SCENARIOS[_name](Path(_directory)))
