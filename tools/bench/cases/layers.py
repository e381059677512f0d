"""How pull and run grow with the number of an image's layers."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from tools.bench.case import Case
from tools.bench.cases.pull import freed, sync
from tools.bench.engines.engine import BenchError, Engine, Plan
from tools.bench.figures import Quantity
from tools.bench.rounds import Stopwatch, Trial, interleave
from tools.bench.stage import used_bytes

if TYPE_CHECKING:
    from tools.bench.bench import Bench

AXIS = "layers"


def layers_quantity(engine: Engine, what: str, at: int) -> Quantity:
    """What is called in the report how."""
    return Quantity("layers", f"{what} through {engine.api} API", at=at, axis=AXIS)


async def _measure(bench: Bench) -> None:
    engines = await bench.engines()
    for size in bench.scale.layers:
        reference = bench.pictures.chain(size)
        trials = [
            Trial(engine.subject, partial(_once, engine, reference, size), f"{size} layers")
            for engine in engines
        ]
        await interleave(bench, trials, bench.scale.pulls, warm=bench.scale.warm)


async def _once(engine: Engine, reference: str, size: int, watch: Stopwatch) -> None:
    root = engine.place / "root"
    sync(root)
    before = used_bytes(root)
    with watch(layers_quantity(engine, "pull + unpack", size)):
        await engine.pull(reference)
    sync(root)
    path = f"/layer-{size - 1}" if size > 1 else "/bin/busybox"
    plan = Plan(command=("test", "-f", path), picture=reference)
    if await engine.run(plan):
        raise BenchError(f"the image of {size} layers does not have {path}")
    with watch(layers_quantity(engine, "run-to-exit, network none, runc,", size)):
        await engine.run(plan)
    await engine.remove_image(reference)
    await freed(root, before)


LAYERS = Case(
    "layers",
    "A chain of layers",
    "Images whose every layer but the first has one small file. Each is pulled, a container of it "
    "is run, and it is removed.",
    _measure,
)
