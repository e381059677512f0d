"""Pull and unpack: from the call to the answer, and until all of it is on the disk."""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from functools import partial
from typing import TYPE_CHECKING

from services.common import linux
from tools.bench.case import Case
from tools.bench.engines.command import output
from tools.bench.engines.engine import BenchError, Engine, Plan
from tools.bench.figures import Quantity, Role, Subject
from tools.bench.rounds import Stopwatch, Trial, interleave
from tools.bench.stage import used_bytes

if TYPE_CHECKING:
    from pathlib import Path

    from tools.bench.bench import Bench

LIMIT = Subject("igzip and tar", Role.LIMIT)
KINDS = ("many files", "few big files")
_FREED_S = 60.0
_SLACK_BYTES = 4 << 20
_PAUSE_S = 0.02


def pull_quantity(api: str, kind: str, end: str = "to the answer") -> Quantity:
    """What a pull is called in the report."""
    return Quantity("pull", f"pull + unpack of {kind}, {end}, {api} API")


async def _measure(bench: Bench) -> None:
    engines = await bench.engines()
    for kind, reference in zip(KINDS, (bench.pictures.many(), bench.pictures.big()), strict=True):
        trials = [
            Trial(engine.subject, partial(_pull, engine, reference, kind), f"{kind}, {engine.api}")
            for engine in engines
        ]
        trials.append(await _limit(bench, reference, kind))
        await interleave(bench, trials, bench.scale.pulls, warm=bench.scale.warm)
    for engine in engines:
        with bench.forgiving(engine.subject, "check of the files"):
            await _check(engine, bench.pictures.many(), bench.scale.files)


async def _pull(engine: Engine, reference: str, kind: str, watch: Stopwatch) -> None:
    root = engine.place / "root"
    sync(root)
    before = used_bytes(root)
    began = time.perf_counter()
    with watch(pull_quantity(engine.api, kind)):
        await engine.pull(reference)
    sync(root)
    durable = pull_quantity(engine.api, kind, "to the disk")
    watch.found[durable] = time.perf_counter() - began
    await engine.remove_image(reference)
    await freed(root, before)


async def freed(root: Path, before: int) -> None:
    """Returns when a disk is as empty as before.

    Raises:
        BenchError: it does not become so.
    """
    give_up_at = time.monotonic() + _FREED_S
    while (used := used_bytes(root)) > before + _SLACK_BYTES:
        if time.monotonic() > give_up_at:
            raise BenchError(f"{used - before} bytes of a removed image were not freed")
        await asyncio.sleep(_PAUSE_S)
        sync(root)


def sync(path: Path) -> None:
    """Write a file system to its disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        linux.syncfs(fd)
    finally:
        os.close(fd)


async def _limit(bench: Bench, reference: str, kind: str) -> Trial:
    """The same layers by igzip and tar, one after the other, onto a disk like the engines'."""
    place = bench.place(f"limit-{kind.replace(' ', '-')}")
    layers = place / "layers"
    layers.mkdir()
    paths = []
    for number, (digest, data) in enumerate(bench.pictures.picture(reference).blobs.items()):
        if number:  # the first one is the configuration
            paths.append(layers / digest)
            paths[-1].write_bytes(data)
    target = place / "root" / "files"
    script = "for layer; do igzip -dc < $layer | tar -x -C $TARGET || exit; done"

    async def once(watch: Stopwatch) -> None:
        target.mkdir()
        sync(target)
        began = time.perf_counter()
        await output(
            "env", f"TARGET={target}", "bash", "-o", "pipefail", "-c", script, "-", *map(str, paths)
        )
        unpacked = time.perf_counter() - began
        sync(target)
        durable = time.perf_counter() - began
        for api in ("containerd's", "the daemon's"):
            watch.found[pull_quantity(api, kind)] = unpacked
            watch.found[pull_quantity(api, kind, "to the disk")] = durable
        shutil.rmtree(target)

    return Trial(LIMIT, once, kind)


async def _check(engine: Engine, reference: str, files: int) -> None:
    """A container of a pulled image finds as many files as it has."""
    await engine.pull(reference)
    script = f"test $(find /data -type f | wc -l) = {files}"
    code = await engine.run(Plan(command=("sh", "-c", script), picture=reference))
    if code:
        raise BenchError(f"the pulled image does not have its {files} files")
    await engine.remove_image(reference)


PULL = Case(
    "pull",
    "Pull and unpack",
    "From a registry on loopback. Through containerd's API ctr pulls into both. "
    "`to the disk` adds a syncfs of the engine's root after the answer: what was "
    "durable already takes nothing then. The limit unpacks the same layers with `igzip | tar x`, "
    "one after the other, and knows of no registry, digest or store.",
    _measure,
)
