"""``start`` and ``attach``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from protos.theseus.engine.v1 import containers_pb2 as pb
from services.cli.commands import Command
from services.cli.commands.lifecycle import for_each
from services.cli.foreground import Foreground, container_exit
from services.cli.parser import UsageError
from services.cli.session import Session
from services.cli.starting import start_once
from services.common.errors import FailedPrecondition

if TYPE_CHECKING:
    from argparse import Namespace

    from services.cli.engine import Engine
    from services.cli.parser import Parser


def _start_arguments(parser: Parser) -> None:
    parser.flag("-a", "--attach", help="couple our output and signals with it")
    parser.flag("-i", "--interactive", help="pass our standard input on")
    parser.words("containers", at_least=1)


def _attach_arguments(parser: Parser) -> None:
    parser.flag("--no-stdin", help="do not pass our standard input on")
    parser.words("containers", at_least=1, at_most=1)


async def _start(engine: Engine, options: Namespace) -> int:
    if not (options.attach or options.interactive):

        async def start(container: str) -> None:
            await engine.call(
                engine.containers.Start, pb.StartContainerRequest(container=container)
            )
            sys.stdout.write(f"{container}\n")

        return await for_each(options.containers, start)
    if len(options.containers) > 1:
        raise UsageError("only one container can be started and attached to at a time")
    container = await _get(engine, options.containers[0])
    return await _couple(engine, container, interactive=options.interactive, start=True)


async def _attach(engine: Engine, options: Namespace) -> int:
    container = await _get(engine, options.containers[0])
    if container.state != pb.CONTAINER_STATE_RUNNING:
        raise FailedPrecondition(
            f"container {container.name} is not running: start it with 'theseus start'"
        )
    return await _couple(engine, container, interactive=not options.no_stdin, start=False)


async def _get(engine: Engine, container: str) -> pb.Container:
    request = pb.GetContainerRequest(container=container)
    return (await engine.call(engine.containers.Get, request)).container


async def _couple(
    engine: Engine, container: pb.Container, *, interactive: bool, start: bool
) -> int:
    interactive = interactive and container.config.open_stdin
    attach = pb.AttachStart(
        container=container.id, output=True, input=interactive, from_end=not start
    )
    session = Session(engine, engine.containers.Attach, attach, interactive=interactive)

    async def forward(name: str) -> object:
        request = pb.KillContainerRequest(container=container.id, signal=name)
        return await engine.call(engine.containers.Kill, request)

    async def start_attached() -> None:
        again = start and container.state != pb.CONTAINER_STATE_CREATED
        if again:
            # There is no new run to attach to yet; its output is kept from its beginning on.
            await _start_again(engine, container)
        await session.attach()
        if start and not again:
            await start_once(engine, container.id)

    foreground = Foreground(
        session, tty=container.config.tty, interactive=interactive, forward=forward
    )
    try:
        async with foreground.taken():
            await foreground.unless_ended(start_attached())
            foreground.begin()
            ended = container_exit(engine, container.id, removed=container.config.auto_remove)
            return await foreground.until_exit(ended)
    finally:
        await session.close()


async def _start_again(engine: Engine, container: pb.Container) -> None:
    await engine.call(engine.containers.Start, pb.StartContainerRequest(container=container.id))


COMMANDS = {
    "start": Command(_start_arguments, _start),
    "attach": Command(_attach_arguments, _attach),
}
