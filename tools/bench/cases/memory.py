"""Memory: what each tier has, and what one more idle container takes."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from tools.bench.case import Case
from tools.bench.engines import PACKED
from tools.bench.engines.engine import BenchError
from tools.bench.engines.packed import EACH
from tools.bench.figures import Quantity, Role, Unit
from tools.bench.fleet import fleet
from tools.bench.memory import merges, merging, pss_by_tier

if TYPE_CHECKING:
    from tools.bench.bench import Bench
    from tools.bench.engines.engine import Engine

Tiers = dict[str, tuple[int, float]]

_LOOK_S = 1.0
_LESS = 0.98
_STEADY_S = 3.0
_TO_OFFER_S = 5.0
"""More than a shim of ours takes until it offers its memory to be merged."""

_TO_MERGE_S = 8.0
"""After that it is no more to be expected that pages are merged, if none were yet."""

_SETTLING_MAX_S = 120.0
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
                    _weigh(bench, engine, size, await _settled(engine, shims=size > 0))
    for kind in PACKED:
        with bench.forgiving(kind.subject, f"{EACH} containers to a shim"):
            await _packed(bench, kind, bench.scale.packed)


async def _packed(bench: Bench, kind: type[Engine], size: int) -> None:
    """The same for shims that several containers share."""
    async with bench.started(kind) as engine, fleet(engine, size) as ships:
        await ships.check()
        count, shims = (await _settled(engine, shims=True))["shim"]
        if count != -(-size // EACH):
            raise BenchError(f"{size} containers have {count} shims, {EACH} to each")
        what = f"the shim of an idle container, {EACH} to a shim"
        bench.figures.add(memory_quantity(engine, what, size), engine.subject, shims / size)


async def _settled(engine: Engine, *, shims: bool) -> Tiers:
    """Memory by tier, once it does not become less any more."""
    lowest = tiers = pss_by_tier(engine)
    since = began = time.monotonic()
    always, merged = merging(), False  # somebody else's KSM does not tell when it is through
    while time.monotonic() - began < _SETTLING_MAX_S:
        if merging() and not always:
            since, merged = time.monotonic(), True
        steady_s = _TO_MERGE_S if merges(engine) and not merged else _STEADY_S
        if shims and not merged and engine.subject.role is Role.OURS:
            steady_s = max(steady_s, _TO_OFFER_S)
        if time.monotonic() - since >= steady_s:
            break
        await asyncio.sleep(_LOOK_S)
        tiers = pss_by_tier(engine)
        if _sum(tiers) < _sum(lowest) * _LESS:
            lowest, since = tiers, time.monotonic()
    return tiers


def _sum(tiers: Tiers) -> float:
    return sum(mib for _, mib in tiers.values())


def _weigh(bench: Bench, engine: Engine, size: int, tiers: Tiers) -> None:
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
    "helpers (shim factory, shims that wait, unpackers). Several containers to a shim are "
    "Theseus' by configuration, and containerd's by their group, as in a pod. One sample each, "
    "taken when it has not become less for 3 s. Where the kernel merges equal pages (KSM), as "
    "Theseus has it do for shims, these are 3 s after that.",
    _measure,
)
