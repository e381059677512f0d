"""The steps of a container's life, each by itself."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from tools.bench.case import Case
from tools.bench.cases.run import RUNTIMES
from tools.bench.engines.engine import IDLE, BenchError, Engine, Plan
from tools.bench.figures import Quantity, Subject
from tools.bench.rounds import Stopwatch, Trial, interleave

if TYPE_CHECKING:
    from tools.bench.bench import Bench
    from tools.bench.engines.bare import Bare

APIS = ("containerd's", "the daemon's")


def step(api: str, name: str, runtime: str) -> Quantity:
    """What a step is called in the report."""
    return Quantity("steps", f"{name} through {api} API, {runtime}")


async def _measure(bench: Bench) -> None:
    trials = [
        Trial(engine.subject, partial(_life, engine, runtime), f"{engine.api} API, {runtime}")
        for engine in await bench.engines()
        for runtime in RUNTIMES
    ]
    bare = bench.bare()
    trials += [
        Trial(Subject(f"bare {runtime}", bare.subject.role), partial(_bare, bare, runtime), runtime)
        for runtime in RUNTIMES
    ]
    await interleave(bench, trials, bench.scale.rounds)


async def _life(engine: Engine, runtime: str, watch: Stopwatch) -> None:
    def timed(name: str) -> Quantity:
        return step(engine.api, name, runtime)

    with watch(timed("create")):
        container = await engine.create(Plan(command=IDLE, runtime=runtime))
    try:
        with watch(timed("start")):
            await engine.begin(container)
        with watch(timed("exec")):
            code = await engine.execute(container)
        if code:
            raise BenchError(f"exec ended with {code}")
        with watch(timed("stop")):
            code = await engine.stop(container)
        if code:
            raise BenchError(f"told to end, the container ended with {code}")
        with watch(timed("remove")):
            await engine.remove(container)
    except BaseException:
        with suppress(Exception):
            await engine.destroy(container)
        raise


async def _bare(bare: Bare, runtime: str, watch: Stopwatch) -> None:
    found = Stopwatch()
    names = ("create", "start", "exec", "stop", "remove")
    steps = {name: Quantity("steps", name) for name in names}
    with found(steps["create"]):
        container, init = await bare.create(runtime)
    with found(steps["start"]):
        await bare.begin(runtime, container)
    with found(steps["exec"]):
        await bare.execute(runtime, container)
    with found(steps["stop"]):
        await bare.kill(init)
    with found(steps["remove"]):
        await bare.delete(runtime, container)
    for name, quantity in steps.items():
        for api in APIS:
            watch.found[step(api, name, runtime)] = found.found[quantity]


STEPS = Case(
    "steps",
    "Create, start, exec, stop, remove",
    "Each call by itself, on an idle container without a network. Through containerd's API create "
    "is record, snapshot and task; stop is SIGTERM and the wait; remove is task, snapshot and "
    "record. exec is `true` to its exit code, through the daemon's APIs `echo ok` with its "
    "output attached to and compared. The command ends at SIGTERM at once.",
    _measure,
)
