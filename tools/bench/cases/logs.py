"""Log throughput: a container that writes as fast as it can."""

from __future__ import annotations

import asyncio
import os
import time
from functools import partial
from typing import TYPE_CHECKING

from tools.bench.case import Case
from tools.bench.engines.command import output
from tools.bench.engines.engine import BenchError, Engine, Plan
from tools.bench.figures import Quantity, Role, Subject, Unit
from tools.bench.rounds import Stopwatch, Trial, interleave

if TYPE_CHECKING:
    from pathlib import Path

    from tools.bench.bench import Bench

LIMIT = Subject("cat into a file", Role.LIMIT)
_LINE_BYTES = 100
_TAIL_BYTES = 4096
_COMPLETE_S = 60.0
_PAUSE_S = 0.001


def logs_quantity(api: str) -> Quantity:
    """What the throughput is called in the report."""
    kind = "a raw file" if api == "containerd's" else "a log of lines"
    return Quantity("logs", f"output into {kind}, {api} API", Unit.MEBIBYTES_PER_SECOND)


async def _measure(bench: Bench) -> None:
    place = bench.place("lines")
    lines = place / "lines"
    count = (bench.scale.log_mib << 20) // _LINE_BYTES
    padding = "x" * (_LINE_BYTES - 10)
    lines.write_text("".join(f"{number:08} {padding}\n" for number in range(count)))
    trials = [
        Trial(engine.subject, partial(_write, engine, lines, count), f"{engine.api} API")
        for engine in await bench.engines()
    ]
    trials.append(
        Trial(LIMIT, partial(_limit, lines, place / "root" / "copy", count * _LINE_BYTES), "cat")
    )
    await interleave(bench, trials, bench.scale.pulls, warm=bench.scale.warm)


async def _write(engine: Engine, lines: Path, count: int, watch: Stopwatch) -> None:
    plan = Plan(command=("cat", "/lines"), binds={str(lines): "/lines"}, log=True)
    container = await engine.create(plan)
    began = time.perf_counter()
    await engine.begin(container)
    path = await engine.log_path(container)
    if code := await engine.wait(container):
        raise BenchError(f"cat ended with {code}")
    await _complete(path, f"{count - 1:08} x")
    seconds = time.perf_counter() - began
    watch.found[logs_quantity(engine.api)] = count * _LINE_BYTES / seconds / (1 << 20)
    with path.open("rb") as log:
        # In k8s-file what a read cut in two is two lines, of which the first one says so.
        found = sum(b" stdout P " not in line for line in log)
    if found != count:
        raise BenchError(f"{path.name} has {found} of {count} lines")
    await engine.remove(container)
    path.unlink(missing_ok=True)


async def _complete(path: Path, last: str) -> None:
    """Returns when the last line is in a log."""
    give_up_at = time.monotonic() + _COMPLETE_S
    while last.encode() not in _tail(path):
        if time.monotonic() > give_up_at:
            raise BenchError(f"{path.name} never had its last line")
        await asyncio.sleep(_PAUSE_S)


def _tail(path: Path) -> bytes:
    with path.open("rb") as log:
        log.seek(max(0, log.seek(0, os.SEEK_END) - _TAIL_BYTES))
        return log.read()


async def _limit(lines: Path, copy: Path, size: int, watch: Stopwatch) -> None:
    began = time.perf_counter()
    await output("sh", "-c", f"cat {lines} > {copy}")
    seconds = time.perf_counter() - began
    for api in ("containerd's", "the daemon's"):
        watch.found[logs_quantity(api)] = size / seconds / (1 << 20)
    await output("rm", str(copy))


LOGS = Case(
    "logs",
    "Log throughput",
    "A container writes a file of lines of 100 bytes to its standard output; timed from its start "
    "until it has ended and its last line is in the log. Theseus and dockerd write json-file, "
    "podman k8s-file; through containerd's API it is `file://` for both.",
    _measure,
)
