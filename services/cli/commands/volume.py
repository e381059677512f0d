"""``volume``: ``ls``, ``create``, ``rm``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from protos.theseus.engine.v1 import system_pb2 as pb
from services.cli import table, values
from services.cli.commands import Command
from services.cli.commands.lifecycle import for_each
from services.cli.parser import Parser, UsageError

if TYPE_CHECKING:
    from argparse import Namespace

    from services.cli.engine import Engine

_VERBS = ("ls", "create", "rm")


def _arguments(parser: Parser) -> None:
    parser.words("words", options_end=True)


async def _volume(engine: Engine, options: Namespace) -> int:
    verb, *rest = options.words or [""]
    if verb not in _VERBS:
        raise UsageError(f"'{verb}' is none of {', '.join(_VERBS)}")
    return await {"ls": _ls, "create": _create, "rm": _rm}[verb](engine, rest)


async def _ls(engine: Engine, words: list[str]) -> int:
    parser = Parser("theseus volume ls", "[OPTIONS]", "List volumes")
    parser.flag("-q", "--quiet", help="only the names")
    parser.words("nothing", at_most=0)
    options = parser.parse(words)
    volumes = (await engine.call(engine.volumes.List, pb.ListVolumesRequest())).volumes
    if options.quiet:
        sys.stdout.writelines(f"{volume.name}\n" for volume in volumes)
    else:
        table.write(("DRIVER", "VOLUME NAME"), [("local", volume.name) for volume in volumes])
    return 0


async def _create(engine: Engine, words: list[str]) -> int:
    parser = Parser("theseus volume create", "[OPTIONS] [VOLUME]", "Make a volume")
    parser.many("--label", metavar="KEY[=VALUE]", help="a label")
    parser.words("names", at_most=1)
    options = parser.parse(words)
    request = pb.CreateVolumeRequest(
        name=options.names[0] if options.names else "", labels=values.labels(options.label)
    )
    answer = await engine.call(engine.volumes.Create, request)
    sys.stdout.write(f"{answer.volume.name}\n")
    return 0


async def _rm(engine: Engine, words: list[str]) -> int:
    parser = Parser("theseus volume rm", "VOLUME [VOLUME...]", "Remove volumes")
    parser.words("names", at_least=1)

    async def remove(name: str) -> None:
        await engine.call(engine.volumes.Remove, pb.RemoveVolumeRequest(name=name))
        sys.stdout.write(f"{name}\n")

    return await for_each(parser.parse(words).names, remove)


COMMANDS = {"volume": Command(_arguments, _volume)}
