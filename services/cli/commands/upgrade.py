"""``upgrade shim``: what runs containers is replaced under them."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from protos.theseus.engine.v1 import system_pb2 as pb
from services.cli.commands import Command
from services.cli.engine import LONG_DEADLINE_S
from services.cli.parser import Parser, UsageError

if TYPE_CHECKING:
    from argparse import Namespace

    from services.cli.engine import Engine


def _arguments(parser: Parser) -> None:
    parser.words("words", options_end=True)


async def _upgrade(engine: Engine, options: Namespace) -> int:
    what, *rest = options.words or [""]
    if what != "shim":
        raise UsageError(f"'{what}' cannot be upgraded while it runs; shim can")
    parser = Parser(
        "theseus upgrade shim",
        "--all | CONTAINER [CONTAINER...]",
        "Have shims execute the version that is installed now; containers go on",
    )
    parser.flag("--all", help="those of all running containers")
    parser.words("containers")
    chosen = parser.parse(rest)
    if chosen.all == bool(chosen.containers):
        parser.error("name containers, or give --all")
    request = pb.UpgradeShimsRequest(containers=chosen.containers)
    code = 0
    with engine.failures():
        async for done in engine.system.UpgradeShims(request, timeout=LONG_DEADLINE_S):
            name = done.name or done.container_id
            if done.error:
                sys.stderr.write(f"theseus: shim of {name}: {done.error}\n")
                code = 1
            else:
                sys.stdout.write(
                    f"{name}: {done.version_before} -> {done.version} "
                    f"({done.downtime_us / 1000:.0f} ms)\n"
                )
                sys.stdout.flush()
    return code


COMMANDS = {"upgrade": Command(_arguments, _upgrade)}
