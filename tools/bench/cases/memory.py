"""Memory: what each tier has, and what one more idle container takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tools.bench.case import Case
from tools.bench.figures import Quantity, Unit
from tools.bench.fleet import fleet
from tools.bench.memory import pss_by_tier

if TYPE_CHECKING:
    from tools.bench.bench import Bench
    from tools.bench.engines.engine import Engine

AXIS = "idle containers"
SERVERS = ("daemon", "containerd")


def memory_quantity(engine: Engine, what: str, at: int) -> Quantity:
    """What an amount is called in the report."""
    return Quantity("memory", f"PSS of {what}, {engine.api} API", Unit.MEBIBYTES, at, AXIS)


async def _measure(bench: Bench) -> None:
    for engine in await bench.engines():
        with bench.forgiving(engine.subject, f"{engine.api} API"):
            async with fleet(engine) as ships:
                for size in bench.scale.crowds:
                    await ships.grow(size)
                    await ships.check()
                    _weigh(bench, engine, size)


def _weigh(bench: Bench, engine: Engine, size: int) -> None:
    tiers = pss_by_tier(engine)
    for tier in SERVERS:
        if tier in tiers:
            bench.figures.add(
                memory_quantity(engine, f"the {tier}", size), engine.subject, tiers[tier][1]
            )
    if not engine.servers:
        tiers.pop("daemon", None)  # a command that has not ended yet
    servers = sum(mib for tier, (_, mib) in tiers.items() if tier in SERVERS)
    if servers:
        bench.figures.add(memory_quantity(engine, "all servers", size), engine.subject, servers)
    if size:
        _, shims = tiers["shim"]
        quantity = memory_quantity(engine, "the shim of an idle container", size)
        bench.figures.add(quantity, engine.subject, shims / size)


MEMORY = Case(
    "memory",
    "Memory",
    "Proportional set size (PSS) of an engine's own processes: what they share with one another "
    "is divided between them. Processes in containers do not count. containerd includes its "
    "helpers (shim factory, unpackers). One sample each.",
    _measure,
)
