"""Networks as containers see them: none, host, bridge, and published ports."""

import os
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from tests.integration.theseus import GATEWAY, until

pytestmark = pytest.mark.root

SERVE = "mkdir /w; echo page > /w/index.html; httpd -f -p 80 -h /w"


SUBNET = GATEWAY.removesuffix("1")


def fetch(url):
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=2) as answer:
            return answer.read()
    except OSError:
        return None


def test_none_has_loopback_only(theseus, runtime):
    result = theseus.run("--runtime", runtime, "--network", "none", "--", "ls", "/sys/class/net")
    assert (result.code, result.out) == (0, "lo\n")


def test_host_shares_the_hosts_network(theseus, runtime):
    result = theseus.run(
        "--runtime",
        runtime,
        "--network",
        "host",
        "--",
        "sh",
        "-c",
        "readlink /proc/self/ns/net; hostname",
    )
    assert result.out.splitlines() == [
        str(Path("/proc/self/ns/net").readlink()),
        os.uname().nodename,
    ]


def test_bridge_has_an_address_a_route_and_hosts(theseus, runtime):
    with theseus.leaves_nothing():
        result = theseus.run(
            *["--runtime", runtime, "-h", "box", "--"],
            *[
                "sh",
                "-c",
                f"ip -4 -o addr show eth0; ip route; cat /etc/hosts; ping -c 1 {GATEWAY}",
            ],
        )
        assert result.code == 0, result
        assert f"inet {SUBNET}" in result.out
        assert f"default via {GATEWAY} dev eth0" in result.out
        assert any(
            line.split()[1:] == ["box"] for line in result.out.splitlines() if SUBNET in line
        )


def test_containers_reach_one_another(theseus):
    theseus.start("--name", "server", "--", "sh", "-c", SERVE)
    address = theseus.inspect("server")["NetworkSettings"]["IPAddress"]
    until(lambda: theseus.run("wget", "-qO-", f"http://{address}/").out == "page\n")


def test_a_published_port_is_reached_on_loopback_and_by_address(theseus, runtime):
    with theseus.leaves_nothing():
        theseus.start(
            "--runtime", runtime, "--name", "web", "-p", "18080:80", "--", "sh", "-c", SERVE
        )
        until(lambda: fetch("http://127.0.0.1:18080/") == b"page\n")
        assert fetch(f"http://{GATEWAY}:18080/") == b"page\n"
        assert "0.0.0.0:18080->80/tcp" in theseus.ok("ps")
        # From another container, by the host's address.
        assert theseus.run("wget", "-qO-", f"http://{GATEWAY}:18080/").out == "page\n"
        theseus.ok("rm", "-f", "web")
        assert fetch("http://127.0.0.1:18080/") is None


def test_a_port_on_one_address_only(theseus):
    theseus.start("--name", "web", "-p", "127.0.0.1:18081:80", "--", "sh", "-c", SERVE)
    until(lambda: fetch("http://127.0.0.1:18081/") == b"page\n")
    assert fetch(f"http://{GATEWAY}:18081/") is None


def test_the_engine_picks_a_free_port(theseus):
    theseus.start("--name", "web", "-p", "80", "--", "sh", "-c", SERVE)
    (binding,) = theseus.inspect("web")["NetworkSettings"]["Ports"]["80/tcp"]
    assert int(binding["HostPort"]) > 1024
    until(lambda: fetch(f"http://127.0.0.1:{binding['HostPort']}/") == b"page\n")


def test_udp_is_published(theseus):
    theseus.start("--name", "echo", "-p", "18053:53/udp", "--", "sleep", "60")
    # busybox has nothing that listens to UDP: a program of ours does, in the container's network.
    listen = (
        "import socket; s = socket.socket(type=socket.SOCK_DGRAM); s.bind(('', 53)); "
        "print('bound', flush=True); print(s.recv(99).decode())"
    )
    command = ["nsenter", "-n", "-t", str(theseus.pid("echo")), sys.executable, "-c", listen]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as listener:
        assert listener.stdout.readline() == "bound\n"
        with socket.socket(type=socket.SOCK_DGRAM) as client:
            client.sendto(b"hello", ("127.0.0.1", 18053))
        assert listener.stdout.readline() == "hello\n"


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_a_port_in_use_is_refused(theseus, protocol):
    kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
    with socket.socket(socket.AF_INET, kind) as taken:
        taken.bind(("0.0.0.0", 18082))
        if protocol == "tcp":
            taken.listen()
        with theseus.leaves_nothing():
            result = theseus.run("-p", f"18082:80/{protocol}", "--", "true")
    assert result.code == 125
    assert "18082" in result.err and "in use" in result.err


def test_a_port_that_another_container_has_is_refused(theseus):
    theseus.start("--name", "first", "-p", "18083:80", "--", "sleep", "60")
    with theseus.leaves_nothing():
        result = theseus.run("-p", "18083:80", "--", "true")
    assert result.code == 125
    assert "18083" in result.err


def test_addresses_are_used_again(theseus):
    def address():
        return theseus.run("sh", "-c", "ip -4 -o addr show eth0").out

    with theseus.leaves_nothing():
        assert SUBNET in address()
        for _ in range(3):
            assert SUBNET in address()


def test_ports_stay_published_across_a_stop_and_start(theseus):
    theseus.start(
        "--name", "web", "-p", "18084:80", "--", "sh", "-c", SERVE.replace("mkdir", "mkdir -p")
    )
    until(lambda: fetch("http://127.0.0.1:18084/") == b"page\n")
    theseus.ok("stop", "-t", "0", "web")
    assert fetch("http://127.0.0.1:18084/") is None
    theseus.ok("start", "web")
    until(lambda: fetch("http://127.0.0.1:18084/") == b"page\n")


def test_names_are_resolved_as_the_host_does(theseus):
    text = theseus.run("cat", "/etc/resolv.conf").out
    host = Path("/etc/resolv.conf").read_text()
    servers = [
        line for line in host.splitlines() if line.startswith("nameserver") and "127." not in line
    ]
    assert all(line in text for line in servers)
