"""How run-to-exit grows with the number of containers that run beside it."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from tools.bench.case import Case
from tools.bench.cases.run import run_once
from tools.bench.engines.engine import BenchError, Engine, Plan
from tools.bench.figures import Quantity, Subject
from tools.bench.fleet import fleet
from tools.bench.rounds import Stopwatch, Trial, interleave

if TYPE_CHECKING:
    from tools.bench.bench import Bench

AXIS = "containers running beside it"


def crowd_quantity(engine: Engine, at: int) -> Quantity:
    """What a run in a crowd is called in the report."""
    what = f"run-to-exit in a crowd through {engine.api} API, network none, runc"
    return Quantity("crowd", what, at=at, axis=AXIS)


async def _measure(bench: Bench) -> None:
    for engine in await bench.engines():
        with bench.forgiving(engine.subject, f"{engine.api} API"):
            async with fleet(engine) as ships:
                for size in bench.scale.crowds:
                    await ships.grow(size)
                    await _run(bench, engine, size)
                    await ships.check()


async def _run(bench: Bench, engine: Engine, size: int) -> None:
    quantity = crowd_quantity(engine, size)
    bare = bench.bare()

    async def listing(watch: Stopwatch) -> None:
        what = f"list of what runs through {engine.api} API"
        with watch(Quantity("crowd", what, at=size, axis="containers running")):
            count = await engine.running()
        if count < size:
            raise BenchError(f"{count} of {size} containers are listed as running")

    async def limit(watch: Stopwatch) -> None:
        with watch(quantity):
            await bare.run("runc")

    subject = Subject("bare runc", bare.subject.role)
    once = partial(run_once, engine, Plan(), quantity)
    trials = [
        Trial(engine.subject, once, quantity.what),
        Trial(engine.subject, listing, "list"),
        Trial(subject, limit, "bare runc"),
    ]
    await interleave(bench, trials, max(2, bench.scale.rounds // 3))


CROWD = Case(
    "crowd",
    "Run-to-exit in a crowd",
    "Run-to-exit while idle containers of the same engine run beside it, and the bare runtime in "
    "the same crowds: what the kernel takes more, nobody can do without. And a list of the tasks "
    "(through containerd's API) or containers, with the state of each.",
    _measure,
)
