"""Containers started per second."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from tools.bench.case import Case
from tools.bench.figures import Quantity, Unit
from tools.bench.fleet import CLIENTS, fleet
from tools.bench.rounds import Stopwatch, Trial, interleave

if TYPE_CHECKING:
    from tools.bench.bench import Bench
    from tools.bench.engines.engine import Engine


def rate_quantity(engine: Engine, network: str, clients: int) -> Quantity:
    """What a rate is called in the report."""
    plural = "client" if clients == 1 else "clients"
    what = f"through {engine.api} API, network {network}, runc, {clients} {plural}"
    return Quantity("rate", f"containers started per second {what}", Unit.PER_SECOND)


def rate_trial(engine: Engine, network: str, clients: int, size: int) -> Trial:
    """A fleet of ``size``, from the first call to create to the last answer to a start."""
    quantity = rate_quantity(engine, network, clients)

    async def once(watch: Stopwatch) -> None:
        async with fleet(engine) as ships:
            began = time.perf_counter()
            await ships.grow(size, clients=clients, network=network)
            seconds = time.perf_counter() - began
            await ships.check()
        watch.found[quantity] = size / seconds

    return Trial(engine.subject, once, f"{clients} clients, network {network}")


async def _measure(bench: Bench) -> None:
    scale = bench.scale
    # All of them run before the first fleet, and only those with the same API take turns: with
    # others between them the order of two would hardly change.
    kinds = (await bench.containerds(), await bench.daemons())
    for clients in (1, CLIENTS):
        for engines in kinds:
            for network in scale.networks:
                with_goal = clients == CLIENTS and network == "none"
                trials = [
                    rate_trial(engine, network, clients, scale.fleet)
                    for engine in engines
                    if network in engine.networks
                ]
                await interleave(bench, trials, scale.fleets if with_goal else 1, warm=False)


RATE = Case(
    "rate",
    "Containers per second",
    "Idle containers are created and started, one client after the other's answer or eight at a "
    "time, until all of them run at the same time; their removal is not timed. A sample is a whole "
    "fleet; of eight clients without a network, for which there is a goal, there are three, the "
    "engines with the same API in turns.",
    _measure,
)
