"""From the start of a tier to its first answer."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from tools.bench.case import Case
from tools.bench.figures import Quantity
from tools.bench.rounds import Stopwatch, Trial, interleave

if TYPE_CHECKING:
    from tools.bench.bench import Bench
    from tools.bench.engines.engine import Engine

CONTAINERD = Quantity("starts", "start of containerd to its first answer")
DAEMON = Quantity("starts", "start of the daemon to its first answer, containerd being there")
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
    "the answer to a first call over a new connection. dockerd starts its own containerd.",
    _measure,
)
