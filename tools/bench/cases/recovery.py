"""Back after SIGKILL, with containers running."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from tools.bench.case import Case
from tools.bench.engines.engine import BenchError
from tools.bench.figures import Quantity
from tools.bench.fleet import Fleet, fleet

if TYPE_CHECKING:
    from tools.bench.bench import Bench
    from tools.bench.engines.engine import Engine

_PAUSE_S = 0.002
_LIMIT_S = 120.0


def recovery_quantity(engine: Engine, end: str, at: int) -> Quantity:
    """What a recovery is called in the report."""
    what = f"from SIGKILL to {end}, {engine.api} API"
    return Quantity("recovery", what, at=at, axis="running containers")


async def _measure(bench: Bench) -> None:
    for engine in await bench.engines():
        if not engine.servers:
            continue
        with bench.forgiving(engine.subject, f"{engine.api} API"):
            async with fleet(engine, bench.scale.fleet) as ships:
                await ships.check()
                for _ in range(bench.scale.pulls):
                    await _recover(bench, engine, ships)


async def _recover(bench: Bench, engine: Engine, ships: Fleet) -> None:
    size = len(ships.containers)

    def note(end: str) -> None:
        quantity = recovery_quantity(engine, end, size)
        bench.figures.add(quantity, engine.subject, time.perf_counter() - began)

    await engine.forget()
    began = time.perf_counter()
    for server in engine.servers:
        server.kill()
    for server in engine.servers:
        server.spawn()
    for server in engine.servers:
        await server.answering()
    note("the first answer")
    give_up_at = time.monotonic() + _LIMIT_S
    while (running := await engine.running()) < size:
        if time.monotonic() > give_up_at:
            raise BenchError(f"{running} of {size} containers are listed as running")
        await asyncio.sleep(_PAUSE_S)
    note("all listed as running")
    if code := await engine.execute(ships.containers[-1]):
        raise BenchError(f"exec after the recovery ended with {code}")
    note("a command run in one of them")


RECOVERY = Case(
    "recovery",
    "Recovery",
    "All servers of an engine are killed at once and started again at once, with containers "
    "running. dockerd runs with --live-restore, and its containerd dies with it.",
    _measure,
)
