"""What an engine waits for the disk to keep: the notes beside the other figures."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from tools.bench.case import Case
from tools.bench.cases.pull import freed, sync
from tools.bench.engines.engine import BenchError, Engine, Plan
from tools.bench.figures import Quantity, Unit
from tools.bench.stage import flushes, used_bytes

if TYPE_CHECKING:
    from tools.bench.bench import Bench


def flush_quantity(engine: Engine, what: str) -> Quantity:
    """What a number of flushes is called in the report."""
    return Quantity("durability", f"flushes of the disk in {what}, {engine.api} API", Unit.COUNT)


def left_quantity(engine: Engine, what: str) -> Quantity:
    """What the rest is called in the report."""
    return Quantity("durability", f"syncfs after the answer to {what}, {engine.api} API")


async def _measure(bench: Bench) -> None:
    reference = bench.pictures.many()
    for engine in await bench.engines():
        with bench.forgiving(engine.subject, f"{engine.api} API"):
            for _ in range(min(5, bench.scale.rounds)):
                await _run(bench, engine)
            await _pull(bench, engine, reference)


async def _run(bench: Bench, engine: Engine) -> None:
    root = engine.place / "root"
    sync(root)
    before = flushes(root)
    if code := await engine.run(Plan()):
        raise BenchError(f"the container ended with {code}")
    quantity = flush_quantity(engine, "run-to-exit")
    bench.figures.add(quantity, engine.subject, flushes(root) - before)


async def _pull(bench: Bench, engine: Engine, reference: str) -> None:
    root = engine.place / "root"
    sync(root)
    before, used = flushes(root), used_bytes(root)
    what = "a pull of many files"
    await engine.pull(reference)
    bench.figures.add(flush_quantity(engine, what), engine.subject, flushes(root) - before)
    began = time.perf_counter()
    sync(root)
    seconds = time.perf_counter() - began
    bench.figures.add(left_quantity(engine, what), engine.subject, seconds)
    await engine.remove_image(reference)
    await freed(root, used)


DURABILITY = Case(
    "durability",
    "What is on the disk",
    "How often the engine made its disk flush what it had been given (each fsync on ext4 does, or "
    "shares another's), and how long it takes to write what is not on the disk when the answer "
    "is there. Less is not better: it is what the other figures were bought with.",
    _measure,
)
