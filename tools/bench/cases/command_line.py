"""Start of the command line clients."""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING

from tools.bench.case import Case
from tools.bench.engines.command import output
from tools.bench.figures import Quantity, Role, Subject
from tools.bench.rounds import Stopwatch, Trial, interleave

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tools.bench.bench import Bench

VERSION = Quantity("cli", "the client's --version")
LIST = Quantity("cli", "the client's list of containers, of which there are none")


async def _measure(bench: Bench) -> None:
    trials = []
    for engine in await bench.engines():
        client = engine.client()
        if client is not None:
            subject = Subject(client.name, engine.subject.role)
            once = partial(_call, [*client.command, "--version"], client.listing)
            trials.append(Trial(subject, once, client.name))
    bare = partial(_bare, [sys.executable, "-c", "pass"])
    trials.append(Trial(Subject("python -c pass", Role.LIMIT), bare, "python"))
    await interleave(bench, trials, bench.scale.rounds)


async def _call(plain: Sequence[str], listing: Sequence[str], watch: Stopwatch) -> None:
    with watch(VERSION):
        await output(*plain)
    with watch(LIST):
        await output(*listing)


async def _bare(command: Sequence[str], watch: Stopwatch) -> None:
    with watch(VERSION):
        await output(*command)
    watch.found[LIST] = watch.found[VERSION]


COMMAND_LINE = Case(
    "cli",
    "Start of the command line clients",
    "The whole life of a client's process. The limit is an interpreter that does nothing.",
    _measure,
)
