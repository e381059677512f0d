"""From the start of a tier to its first answer."""

from __future__ import annotations

import asyncio
import os
import time
import uuid
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING

import aiohttp

from protos.containerd.task.v2 import shim_pb2
from tools.bench.case import Case
from tools.bench.engines import ttrpc
from tools.bench.engines.command import output
from tools.bench.engines.containerd import METRICS, DebianContainerd, TheseusContainerd
from tools.bench.engines.engine import IDLE, BenchError, Plan
from tools.bench.engines.spec import write_bundle
from tools.bench.figures import Quantity
from tools.bench.rounds import Stopwatch, Trial, interleave

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tools.bench.bench import Bench
    from tools.bench.engines.engine import Engine

CONTAINERD = Quantity("starts", "start of containerd to its first answer")
DAEMON = Quantity("starts", "start of the daemon to its first answer, containerd being there")
SHIM = Quantity("starts", "start of a shim until it answers")
_TASK = "containerd.task.v2.Task"
BOTH = Quantity("starts", "start of daemon and containerd at once to the daemon's first answers")


async def _measure(bench: Bench) -> None:
    trials = [
        Trial(engine.subject, partial(_alone, engine), "containerd")
        for engine in await bench.containerds()
    ]
    for engine in await bench.daemons():
        if engine.servers:
            trials.append(Trial(engine.subject, partial(_together, engine), "all tiers"))
        if len(engine.servers) > 1:
            trials.append(Trial(engine.subject, partial(_last, engine), "the daemon"))
    await interleave(bench, trials, bench.scale.pulls, warm=bench.scale.warm)
    shims: list[Trial] = []
    for engine in await bench.containerds():
        if isinstance(engine, TheseusContainerd):
            shims.append(Trial(engine.subject, partial(_our_shim, engine), "the shim"))
        elif isinstance(engine, DebianContainerd):
            shims.append(Trial(engine.subject, partial(_debian_shim, engine), "the shim"))
    await interleave(bench, shims, bench.scale.rounds)


async def _our_shim(engine: TheseusContainerd, watch: Stopwatch) -> None:
    """By the tier's own metric: a container is created, and its shim's start was noted."""
    path = engine.servers[0].address.with_name(METRICS)
    before = await _shim_starts(path)
    await engine.destroy(await engine.create(Plan(command=IDLE)))
    after = await _shim_starts(path)
    if after[1] - before[1] != 1:
        raise BenchError(f"{after[1] - before[1]} shims were started for one container")
    watch.found[SHIM] = after[0] - before[0]


async def _shim_starts(path: Path) -> tuple[float, float]:
    """Seconds and number of all starts of shims."""
    name = "theseus_containerd_shim_start_seconds"
    async with (
        aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(path))) as session,
        session.get("http://containerd/metrics") as answer,
    ):
        lines = (await answer.text()).splitlines()
    found = dict(line.rsplit(" ", 1) for line in lines if line.startswith(name))
    return float(found[f"{name}_sum"]), float(found[f"{name}_count"])


async def _debian_shim(engine: DebianContainerd, watch: Stopwatch) -> None:
    """As its containerd starts it, to its answer to a first call."""
    name = uuid.uuid4().hex
    bundle = engine.place / f"bundle-{name}"
    await asyncio.to_thread(write_bundle, bundle)
    with _log(bundle / "log"):
        began = time.perf_counter()
        said = await output(
            *("env", "-C", str(bundle), "containerd-shim-runc-v2", "-namespace", "bench"),
            *("-address", str(engine.servers[0].address)),
            *("-publish-binary", "/usr/bin/containerd", "-id", name, "start"),
        )
        address = said.strip().removeprefix("unix://")
        connect = shim_pb2.ConnectRequest(id=name)
        await asyncio.to_thread(ttrpc.call, address, _TASK, "Connect", connect)
        watch.found[SHIM] = time.perf_counter() - began
        shutdown = shim_pb2.ShutdownRequest(id=name, now=True)
        with suppress(BenchError, ConnectionError):  # it may end before it answers
            await asyncio.to_thread(ttrpc.call, address, _TASK, "Shutdown", shutdown)


@contextmanager
def _log(path: Path) -> Iterator[None]:
    """The FIFO that containerd reads a shim's log from."""
    os.mkfifo(path)
    descriptor = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    try:
        yield
    finally:
        os.close(descriptor)


async def _alone(engine: Engine, watch: Stopwatch) -> None:
    await engine.close()
    watch.found[CONTAINERD] = await engine.servers[0].start()


async def _last(engine: Engine, watch: Stopwatch) -> None:
    await engine.forget()
    await engine.servers[-1].stop()
    watch.found[DAEMON] = await engine.servers[-1].start()


async def _together(engine: Engine, watch: Stopwatch) -> None:
    await engine.close()
    with watch(BOTH):
        for server in engine.servers:
            server.spawn()
        for server in engine.servers:
            await server.answering()
        await engine.count()


STARTS = Case(
    "starts",
    "Start of each tier",
    "From the start of the program, on a root that was in use before and holds no container, to "
    "the answer to a first call over a new connection. dockerd starts its own containerd. Theseus' "
    "shims are forked by a factory that was started before; its containerd counts what it takes.",
    _measure,
)
