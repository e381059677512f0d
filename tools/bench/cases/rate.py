"""Containers started per second."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from tools.bench.case import Case
from tools.bench.figures import Quantity, Unit
from tools.bench.fleet import CLIENTS, fleet

if TYPE_CHECKING:
    from tools.bench.bench import Bench
    from tools.bench.engines.engine import Engine


def rate_quantity(engine: Engine, network: str, clients: int) -> Quantity:
    """What a rate is called in the report."""
    plural = "client" if clients == 1 else "clients"
    what = f"through {engine.api} API, network {network}, runc, {clients} {plural}"
    return Quantity("rate", f"containers started per second {what}", Unit.PER_SECOND)


async def _measure(bench: Bench) -> None:
    for clients in (1, CLIENTS):
        for engine in await bench.engines():
            for network in (n for n in engine.networks if n in bench.scale.networks):
                with bench.forgiving(engine.subject, f"{clients} clients, network {network}"):
                    await _rate(bench, engine, network, clients)


async def _rate(bench: Bench, engine: Engine, network: str, clients: int) -> None:
    size = bench.scale.fleet
    async with fleet(engine) as ships:
        began = time.perf_counter()
        await ships.grow(size, clients=clients, network=network)
        seconds = time.perf_counter() - began
        await ships.check()
    quantity = rate_quantity(engine, network, clients)
    bench.figures.add(quantity, engine.subject, size / seconds)


RATE = Case(
    "rate",
    "Containers per second",
    "Idle containers are created and started, one client after the other's answer or eight at a "
    "time, until all of them run at the same time; their removal is not timed.",
    _measure,
)
