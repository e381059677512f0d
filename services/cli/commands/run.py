"""``run`` and ``create``."""

from __future__ import annotations

import sys
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

from protos.theseus.engine.v1 import containers_pb2 as pb
from services.cli import progress, terminal
from services.cli.commands import Command
from services.cli.container_options import add_options, container_config
from services.cli.failure import warn
from services.cli.foreground import Foreground, container_exit
from services.cli.parser import UsageError
from services.cli.session import Session
from services.cli.starting import start_once
from services.common.errors import NotFound, TheseusError

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import AsyncIterator

    from services.cli.engine import Engine
    from services.cli.parser import Parser

EXIT_REFUSED = 125


def _run_arguments(parser: Parser) -> None:
    parser.flag("-d", "--detach", help="print its id, and leave it running")
    add_options(parser)


async def _run(engine: Engine, options: Namespace) -> int:
    config = container_config(options)
    if options.detach:
        identity = await _create(engine, options, config)
        async with _removed_unless_started(engine, identity, config):
            await start_once(engine, identity)
        sys.stdout.write(f"{identity}\n")
        return 0
    if config.tty and config.open_stdin and not terminal.is_terminal(0):
        raise UsageError("the input device is not a TTY: leave out -t, or run from a terminal")
    identity = await _create(engine, options, config)
    return await _run_in_foreground(engine, identity, config)


async def _run_in_foreground(engine: Engine, identity: str, config: pb.ContainerConfig) -> int:
    start = pb.AttachStart(container=identity, output=True, input=config.open_stdin)
    session = Session(engine, engine.containers.Attach, start, interactive=config.open_stdin)

    async def forward(name: str) -> object:
        request = pb.KillContainerRequest(container=identity, signal=name)
        return await engine.call(engine.containers.Kill, request)

    async def start_attached() -> None:
        await session.attach()
        await start_once(engine, identity)

    foreground = Foreground(session, tty=config.tty, interactive=config.open_stdin, forward=forward)
    try:
        async with foreground.taken():
            async with _removed_unless_started(engine, identity, config):
                await foreground.unless_ended(start_attached())
            foreground.begin()
            ended = container_exit(engine, identity, removed=config.auto_remove)
            return await foreground.until_exit(ended)
    finally:
        await session.close()


async def _create(engine: Engine, options: Namespace, config: pb.ContainerConfig) -> str:
    request = pb.CreateContainerRequest(name=options.name, config=config)
    if options.pull == "always":
        await progress.pull(engine, config.image, out=sys.stderr)
    try:
        answer = await engine.call(engine.containers.Create, request)
    except NotFound as error:
        if options.pull != "missing" or not _is_about(error, "image"):
            raise
        sys.stderr.write(f"Unable to find image '{config.image}' locally\n")
        await progress.pull(engine, config.image, out=sys.stderr)
        answer = await engine.call(engine.containers.Create, request)
    for sentence in answer.warnings:
        warn(sentence)
    return answer.id


@asynccontextmanager
async def _removed_unless_started(
    engine: Engine, identity: str, config: pb.ContainerConfig
) -> AsyncIterator[None]:
    """Remove a container that was to remove itself, and cannot since it never ran."""
    try:
        yield
    except BaseException:
        if config.auto_remove:
            request = pb.RemoveContainerRequest(container=identity, force=True, volumes=True)
            with suppress(TheseusError):
                await engine.call(engine.containers.Remove, request)
        raise


def _is_about(error: NotFound, kind: str) -> bool:
    return error.resource is None or error.resource[0] == kind


async def _create_only(engine: Engine, options: Namespace) -> int:
    identity = await _create(engine, options, container_config(options))
    sys.stdout.write(f"{identity}\n")
    return 0


COMMANDS = {
    "run": Command(_run_arguments, _run, failure=EXIT_REFUSED),
    "create": Command(add_options, _create_only, failure=EXIT_REFUSED),
}
