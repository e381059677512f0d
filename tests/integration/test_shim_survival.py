"""Shims are replaced and killed under real containers, which do not notice.

THESEUS_SOAK=1 makes the numbers those of the requirements: 1,000 re-execs, 50 with a terminal, 50
dead shims, 200 exits under a dying containerd.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import select
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from protos.theseus.shim.v1 import upgrades_pb2, upgrades_pb2_grpc
from services.common.client import connect
from tests.integration.theseus import until

SOAK = bool(os.environ.get("THESEUS_SOAK"))
pytestmark = [pytest.mark.root, pytest.mark.timeout(7200 if SOAK else 240)]

REEXECS = 1000 if SOAK else 12
TERMINAL_REEXECS = 50 if SOAK else 5
DEAD_SHIMS = 50 if SOAK else 6
EXITS = 200 if SOAK else 16
COUNTING = "n=0; while [ ! -e /stop ]; do n=$((n+1)); echo $n; sleep 0.02; done; exit 7"


def shim_record(theseus, container):
    return json.loads(
        (theseus.engine.state / "containerd/tasks/theseus" / container / "shim.json").read_text()
    )


def shim_pid(theseus, container):
    return shim_record(theseus, container)["pid"]


def kill_shim(theseus, container):
    """SIGKILL a container's shim; returns when it has ended."""
    descriptor = os.pidfd_open(shim_pid(theseus, container))
    try:
        signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        assert select.select([descriptor], [], [], 10)[0]
    finally:
        os.close(descriptor)


def reported_loss(theseus, container):
    """Bytes of output that successors of a shim have said were inside it."""
    text = (theseus.engine.state / "containerd/tasks/theseus" / container / "shim.log").read_text()
    entries = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    return sum(entry.get("at_most_bytes", 0) for entry in entries)


def log_numbers(theseus, container):
    path = theseus.engine.root / "daemon/containers" / container / f"{container}-json.log"
    return [int(json.loads(line)["log"]) for line in path.read_text().splitlines()]


async def reexecute(theseus, container, times):
    """Have a shim re-executed so often; returns for how long nothing was read, in ms."""
    downtimes = []
    async with connect(theseus.engine.containerd, namespace="theseus") as channel:
        stub = upgrades_pb2_grpc.UpgradesStub(channel)
        request = upgrades_pb2.UpgradeShimsRequest(container_ids=[container])
        for _ in range(times):
            async for done in stub.UpgradeShims(request, timeout=120):
                assert not done.error, done
                downtimes.append(done.downtime_us // 1000)
    assert len(downtimes) == times
    return downtimes


def stop(theseus, container):
    """Have a container that looks for the file end, after an exec in it.

    Not by that exec: init may end, and take it along, before it is done.
    """
    theseus.ok("exec", container, "true")
    Path(f"/proc/{theseus.pid(container)}/root/stop").touch()


def full_id(theseus, container):
    return theseus.inspect(container)["Id"]


def test_lines_are_neither_lost_nor_doubled_over_many_reexecs(theseus):
    container = full_id(theseus, theseus.start("sh", "-c", COUNTING))
    follower = theseus.spawn("logs", "-f", container)
    attached = theseus.spawn("attach", "--no-stdin", container)
    pid, init = shim_pid(theseus, container), theseus.pid(container)
    assert re.search(r" -> \S+ \(\d+ ms\)", theseus.ok("upgrade", "shim", container, timeout=120))
    downtimes = sorted(asyncio.run(reexecute(theseus, container, REEXECS - 1)))
    assert (shim_pid(theseus, container), theseus.pid(container)) == (pid, init)
    stop(theseus, container)
    assert theseus.ok("wait", container) == "7"
    numbers = log_numbers(theseus, container)
    assert numbers == list(range(1, len(numbers) + 1))
    everything = "".join(f"{number}\n" for number in numbers)
    assert follower.communicate(timeout=60)[0] == everything
    seen = attached.communicate(timeout=60)[0].split()
    first = int(seen[0])
    assert [int(number) for number in seen] == list(range(first, len(numbers) + 1))
    print(  # noqa: T201 - figures for who asks for them
        f"{REEXECS} re-execs, {len(numbers)} lines, time without reading in ms: "
        f"median {downtimes[len(downtimes) // 2]}, largest {downtimes[-1]}"
    )


def test_terminal_exec_and_wait_go_on_over_reexecs(theseus):
    container = theseus.start("-t", "-i", "--", "sh")
    waiting = theseus.spawn("wait", container)
    session = theseus.spawn("exec", "-i", container, "sh")
    for number in range(TERMINAL_REEXECS):
        session.stdin.write(f"echo line {number}\n")
        session.stdin.flush()
        assert session.stdout.readline() == f"line {number}\n"
        theseus.ok("upgrade", "shim", container, timeout=120)
        assert theseus.ok("exec", "-t", container, "echo", "ok").strip() == "ok"
    assert session.communicate("exit 5\n", timeout=60)[0] == ""
    assert session.returncode == 5
    assert waiting.poll() is None
    theseus.ok("kill", container)
    assert waiting.communicate(timeout=60)[0] == "137\n"


def test_upgrade_of_all_reports_each(theseus):
    containers = [theseus.start("sleep", "1000") for _ in range(3)]
    lines = theseus.ok("upgrade", "shim", "--all", timeout=200).splitlines()
    assert len(lines) == len(containers)
    for container in containers:
        assert theseus.inspect(container)["State"]["Status"] == "running"
    assert theseus("upgrade", "shim", "nobody").code == 1
    assert theseus("upgrade", "shim").code != 0


def test_dead_shims_are_replaced_and_statuses_are_true(theseus):
    script = "n=0; while [ ! -e /stop ]; do n=$((n+1)); echo $n; sleep 0.05; done; exit $CODE"
    codes = [random.randrange(256) for _ in range(DEAD_SHIMS)]

    def start(code):
        return theseus.start("-e", f"CODE={code}", "--", "sh", "-c", script)

    with ThreadPoolExecutor(4) as pool:
        containers = [full_id(theseus, short) for short in pool.map(start, codes)]
    inits = [theseus.pid(container) for container in containers]
    dead = [shim_pid(theseus, container) for container in containers]
    waiting = [theseus.spawn("wait", container) for container in containers]
    began = time.monotonic()
    for container in containers:
        kill_shim(theseus, container)
    until(
        lambda: all(
            shim_pid(theseus, container) != pid
            for container, pid in zip(containers, dead, strict=True)
        ),
        timeout=120,
    )
    took_s = time.monotonic() - began
    assert [theseus.pid(container) for container in containers] == inits
    losses = [reported_loss(theseus, container) for container in containers]
    for container in containers:
        stop(theseus, container)
    assert [process.communicate(timeout=60)[0] for process in waiting] == [
        f"{code}\n" for code in codes
    ]
    for container, lost_bytes in zip(containers, losses, strict=True):
        numbers = log_numbers(theseus, container)
        assert numbers == sorted(set(numbers))
        missing = set(range(1, numbers[-1])) - set(numbers)
        assert sum(len(f"{number}\n") for number in missing) <= lost_bytes
    print(f"{DEAD_SHIMS} shims killed and replaced in {took_s:.1f} s")  # noqa: T201


def test_end_without_containerd_and_shim_is_known(theseus):
    container = full_id(theseus, theseus.start("sh", "-c", COUNTING.replace("7", "9")))
    init = theseus.pid(container)
    descriptor = os.pidfd_open(init)
    with theseus.down("containerd"):
        kill_shim(theseus, container)
        Path(f"/proc/{init}/root/stop").touch()
        assert select.select([descriptor], [], [], 30)[0]  # init ends with nobody there
    os.close(descriptor)
    theseus.wait_until_up()
    assert theseus.ok("wait", container) == "9"


def test_exits_while_containerd_dies_at_random_have_the_right_codes(theseus):
    codes = [random.randrange(256) for _ in range(EXITS)]

    def run(code):
        delay = random.uniform(0.2, 3)
        return theseus.start("sh", "-c", f"sleep {delay:.2f}; exit {code}")

    containers = []
    with ThreadPoolExecutor(4) as pool:
        for batch in range(0, EXITS, 8):
            containers += pool.map(run, codes[batch : batch + 8])
            theseus.kill_tiers("containerd")
            theseus.wait_until_up()
    assert [theseus.ok("wait", container) for container in containers] == [
        str(code) for code in codes
    ]
