"""``ps``."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from protos.theseus.engine.v1 import containers_pb2 as pb
from services.cli import table
from services.cli.commands import Command
from services.cli.names import familiar

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Iterable

    from services.cli.engine import Engine
    from services.cli.parser import Parser

_HEADINGS = ("CONTAINER ID", "IMAGE", "COMMAND", "CREATED", "STATUS", "PORTS", "NAMES")
_COMMAND_WIDTH = 20


def _arguments(parser: Parser) -> None:
    parser.flag("-a", "--all", help="those that do not run, too")
    parser.flag("-q", "--quiet", help="only the ids")
    parser.flag("--no-trunc", help="do not shorten anything")
    parser.words("nothing", at_most=0)


async def _ps(engine: Engine, options: Namespace) -> int:
    request = pb.ListContainersRequest(all=options.all)
    containers = (await engine.call(engine.containers.List, request)).containers
    if options.quiet:
        for container in containers:
            identity = container.id if options.no_trunc else table.short(container.id)
            sys.stdout.write(f"{identity}\n")
        return 0
    table.write(_HEADINGS, [_row(c, whole=options.no_trunc) for c in containers])
    return 0


def _row(container: pb.Container, *, whole: bool) -> tuple[str, ...]:
    command = " ".join(container.args)
    if not whole and len(command) > _COMMAND_WIDTH:
        command = command[: _COMMAND_WIDTH - 1] + "…"
    return (
        container.id if whole else table.short(container.id),
        familiar(container.config.image),
        f'"{command}"',
        table.ago(container.created_at),
        status(container),
        ports(container.ports),
        container.name,
    )


def status(container: pb.Container) -> str:
    """State in words, as docker has them."""
    match container.state:
        case pb.CONTAINER_STATE_RUNNING | pb.CONTAINER_STATE_PAUSED:
            started = container.started_at.ToNanoseconds() / 1e9
            up = f"Up {table.duration(time.time() - started)}"
            return up if container.state == pb.CONTAINER_STATE_RUNNING else f"{up} (Paused)"
        case pb.CONTAINER_STATE_EXITED:
            code = "lost" if container.exit.lost else container.exit.code
            return f"Exited ({code}) {table.ago(container.exit.finished_at)}"
        case pb.CONTAINER_STATE_REMOVING:
            return "Removal In Progress"
        case _:
            return "Created"


def ports(mappings: Iterable[pb.PortMapping]) -> str:
    """Mappings as ``0.0.0.0:80->80/tcp``."""
    return ", ".join(
        f"{mapping.host_ip or '0.0.0.0'}:{mapping.host_port}->"
        f"{mapping.container_port}/{mapping.protocol or 'tcp'}"
        for mapping in mappings
    )


COMMANDS = {"ps": Command(_arguments, _ps)}
