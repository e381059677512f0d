"""Run-to-exit: from the first call to create a container to the answer that it is removed."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING

from tools.bench.case import Case
from tools.bench.engines.engine import BenchError, Engine, Plan
from tools.bench.figures import Quantity, Subject
from tools.bench.rounds import Stopwatch, Trial, interleave

if TYPE_CHECKING:
    from tools.bench.bench import Bench
    from tools.bench.engines.bare import Bare

RUNTIMES = ("runc", "crun")


async def run_once(engine: Engine, plan: Plan, quantity: Quantity, watch: Stopwatch) -> None:
    """Time one run; it has to end well."""
    with watch(quantity):
        code = await engine.run(plan)
    if code:
        raise BenchError(f"the container ended with {code}")


def run_quantity(engine: Engine, plan: Plan) -> Quantity:
    """What a run is called in the report."""
    what = f"run-to-exit through {engine.api} API, network {plan.network}, {plan.runtime}"
    return Quantity("run", what)


async def _measure(bench: Bench) -> None:
    trials = []
    for engine in await bench.engines():
        for network in engine.networks:
            for runtime in RUNTIMES:
                plan = Plan(runtime=runtime, network=network)
                quantity = run_quantity(engine, plan)
                once = partial(run_once, engine, plan, quantity)
                trials.append(Trial(engine.subject, once, quantity.what))
    trials += [_limit(bench.bare(), runtime, trials) for runtime in RUNTIMES]
    await interleave(bench, trials, bench.scale.rounds)


def _limit(bare: Bare, runtime: str, trials: list[Trial]) -> Trial:
    """The bare runtime once a round, as the limit of all that use it."""
    whats = dict.fromkeys(trial.name for trial in trials if trial.name.endswith(runtime))

    async def once(watch: Stopwatch) -> None:
        began = time.perf_counter()
        await bare.run(runtime)
        seconds = time.perf_counter() - began
        for what in whats:
            watch.found[Quantity("run", what)] = seconds

    return Trial(Subject(f"bare {runtime}", bare.subject.role), once, f"bare {runtime}")


RUN = Case(
    "run",
    "Run-to-exit",
    "From the call that creates a container of `true` to the answer that it is removed, the wait "
    "for its end under way before it is started. podman: `podman run --rm`.",
    _measure,
)
