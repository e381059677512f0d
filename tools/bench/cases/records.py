"""List and inspect, and how they grow with the number of containers."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from tools.bench.case import Case
from tools.bench.engines.engine import BenchError, Engine, Plan
from tools.bench.figures import Quantity
from tools.bench.fleet import CLIENTS, concurrently
from tools.bench.rounds import Stopwatch, Trial, interleave

if TYPE_CHECKING:
    from tools.bench.bench import Bench

AXIS = "container records"


def records_quantity(engine: Engine, what: str, at: int) -> Quantity:
    """What a call is called in the report."""
    return Quantity("records", f"{what} through {engine.api} API", at=at, axis=AXIS)


async def _measure(bench: Bench) -> None:
    made: dict[Engine, list[str]] = {engine: [] for engine in await bench.engines()}
    others = {engine: await engine.count() for engine in made}
    try:
        for size in bench.scale.records:
            trials = []
            for engine, containers in made.items():
                with bench.forgiving(engine.subject, f"{size} records") as outcome:
                    await _grow(engine, containers, size)
                if outcome.well:
                    once = partial(_ask, engine, containers, others[engine])
                    trials.append(Trial(engine.subject, once, f"{size}, {engine.api} API"))
            await interleave(bench, trials, bench.scale.rounds)
    finally:
        for engine, containers in made.items():
            await concurrently(CLIENTS, containers, engine.discard)


async def _grow(engine: Engine, containers: list[str], size: int) -> None:
    async def make(_: int) -> None:
        containers.append(await engine.record(Plan()))

    await concurrently(CLIENTS, range(len(containers), size), make)


async def _ask(engine: Engine, containers: list[str], others: int, watch: Stopwatch) -> None:
    size = len(containers)
    with watch(records_quantity(engine, "list", size)):
        count = await engine.count()
    if count - others != size:
        raise BenchError(f"{count} of {size} containers are listed")
    with watch(records_quantity(engine, "inspect of one", size)):
        await engine.inspect(containers[size // 2])


RECORDS = Case(
    "records",
    "List and inspect",
    "Containers that were created and never started. Through containerd's API these are records "
    "alone; dockerd's, podman's and Theseus' have a root file system prepared too.",
    _measure,
)
