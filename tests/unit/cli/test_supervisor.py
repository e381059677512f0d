"""Programs that serve gRPC kept running: restarted when they die, ended in order."""

import asyncio
import os
import signal
import sys

import pytest

from services.cli.supervisor import Supervisor, Tier
from services.common.errors import FailedPrecondition

PROGRAM = """
import asyncio, os, pathlib, signal, sys
from services.common.metrics import ServerMetrics
from services.common.server import RpcServer

async def main():
    socket, notes = map(pathlib.Path, sys.argv[1:])
    server = RpcServer(
        tier="t", socket=socket, services=[], metrics=ServerMetrics()
    )
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await server.start()
    with notes.open("a") as file:
        file.write(f"{socket.name} {os.getpid()}\\n")
    await stop.wait()
    with notes.open("a") as file:
        file.write(f"{socket.name} end\\n")
    await server.stop(0)

asyncio.run(main())
"""


@pytest.fixture
def tiers(tmp_path):
    program = (sys.executable, "-c", PROGRAM)
    return [
        Tier(
            name=name,
            command=(*program, str(tmp_path / f"{name}.sock"), str(tmp_path / "notes")),
            socket=tmp_path / f"{name}.sock",
            log_file=tmp_path / "logs" / f"{name}.log",
        )
        for name in ("first", "second")
    ]


def notes(tmp_path):
    return [line.split() for line in (tmp_path / "notes").read_text().splitlines()]


async def test_a_tier_that_dies_is_started_again_and_all_end_in_order(tmp_path, tiers):
    async with Supervisor(tiers) as supervisor:
        await supervisor.ready()
        started = dict(notes(tmp_path))
        assert set(started) == {"first.sock", "second.sock"}
        os.kill(int(started["first.sock"]), signal.SIGKILL)
        async with asyncio.timeout(20):
            while len(notes(tmp_path)) < 3:  # noqa: ASYNC110 - another process' doing
                await asyncio.sleep(0.02)
        assert notes(tmp_path)[2][0] == "first.sock"
        supervisor.stop()
        await supervisor.stopped()
    assert notes(tmp_path)[3:] == [["second.sock", "end"], ["first.sock", "end"]]
    for _, pid in notes(tmp_path)[:3]:
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)


async def test_one_that_never_serves_is_an_error_and_ends_the_others(tmp_path, tiers):
    broken = Tier("broken", (sys.executable, "-c", "raise SystemExit(3)"), tmp_path / "b.sock")
    async with Supervisor([tiers[0], broken]) as supervisor:
        with pytest.raises(FailedPrecondition, match="broken ended with 3 before it served"):
            await supervisor.ready()
    assert [what for _, what in notes(tmp_path)][-1:] in ([], ["end"])


async def test_a_stop_while_starting_is_heard(tmp_path):
    silent = Tier(
        "silent", (sys.executable, "-c", "import time; time.sleep(60)"), tmp_path / "s.sock"
    )
    async with asyncio.timeout(15), Supervisor([silent]) as supervisor:
        asyncio.get_running_loop().call_later(0.2, supervisor.stop)
        await supervisor.ready()
        assert supervisor.stopping
