"""``stop``, ``kill``, ``wait`` and ``rm``: the same thing done to each container that is named."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from protos.theseus.engine.v1 import containers_pb2 as pb
from services.cli import values
from services.cli.commands import Command
from services.cli.engine import DEADLINE_S, LONG_DEADLINE_S
from services.cli.failure import report
from services.cli.foreground import container_exit, exit_code
from services.common.errors import TheseusError

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Awaitable, Callable, Iterable

    from services.cli.engine import Engine
    from services.cli.parser import Parser


async def for_each(names: Iterable[str], work: Callable[[str], Awaitable[None]]) -> int:
    """Do ``work`` for every name; one that fails is reported, and the others go on."""
    code = 0
    for name in names:
        try:
            await work(name)
        except TheseusError as error:
            report(error)
            code = 1
    return code


def _stop_arguments(parser: Parser) -> None:
    parser.option("-t", "--time", metavar="SECONDS", help="until SIGKILL; -1: wait without limit")
    parser.words("containers", at_least=1)


async def _stop(engine: Engine, options: Namespace) -> int:
    timeout = values.number(options.time, "--time") if options.time else None
    # The container's own limit is not known here.
    deadline_s = LONG_DEADLINE_S if timeout is None or timeout < 0 else timeout + DEADLINE_S

    async def stop(container: str) -> None:
        request = pb.StopContainerRequest(container=container)
        if timeout is not None:
            request.timeout.FromSeconds(timeout)
        await engine.call(engine.containers.Stop, request, deadline_s=deadline_s)
        sys.stdout.write(f"{container}\n")

    return await for_each(options.containers, stop)


def _kill_arguments(parser: Parser) -> None:
    parser.option("-s", "--signal", metavar="SIGNAL", help="name or number (SIGKILL)")
    parser.words("containers", at_least=1)


async def _kill(engine: Engine, options: Namespace) -> int:
    async def kill(container: str) -> None:
        request = pb.KillContainerRequest(container=container, signal=options.signal)
        await engine.call(engine.containers.Kill, request)
        sys.stdout.write(f"{container}\n")

    return await for_each(options.containers, kill)


def _wait_arguments(parser: Parser) -> None:
    parser.words("containers", at_least=1)


async def _wait(engine: Engine, options: Namespace) -> int:
    async def wait(container: str) -> None:
        status = await container_exit(engine, container)
        sys.stdout.write(f"{exit_code(status)}\n")
        sys.stdout.flush()

    return await for_each(options.containers, wait)


def _rm_arguments(parser: Parser) -> None:
    parser.flag("-f", "--force", help="kill it first if it runs")
    parser.flag("-v", "--volumes", help="remove its anonymous volumes too")
    parser.words("containers", at_least=1)


async def _rm(engine: Engine, options: Namespace) -> int:
    async def remove(container: str) -> None:
        request = pb.RemoveContainerRequest(
            container=container, force=options.force, volumes=options.volumes
        )
        await engine.call(engine.containers.Remove, request)
        sys.stdout.write(f"{container}\n")

    return await for_each(options.containers, remove)


COMMANDS = {
    "stop": Command(_stop_arguments, _stop),
    "kill": Command(_kill_arguments, _kill),
    "wait": Command(_wait_arguments, _wait),
    "rm": Command(_rm_arguments, _rm),
}
