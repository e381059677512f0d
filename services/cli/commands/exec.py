"""``exec``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from protos.theseus.engine.v1 import containers_pb2 as pb
from services.cli import terminal, values
from services.cli.commands import Command
from services.cli.exec_run import ExecRun, exec_exit
from services.cli.foreground import Foreground
from services.cli.parser import UsageError
from services.cli.session import Session

if TYPE_CHECKING:
    from argparse import Namespace

    from services.cli.engine import Engine
    from services.cli.parser import Parser


def _arguments(parser: Parser) -> None:
    parser.flag("-i", "--interactive", help="pass our standard input on")
    parser.flag("-t", "--tty", help="give it a terminal")
    parser.flag("-d", "--detach", help="leave it running")
    parser.flag("--privileged", help="give it all that root has")
    parser.many("-e", "--env", metavar="NAME[=VALUE]", help="set a variable")
    parser.many("--env-file", metavar="FILE", help="set the variables that a file has")
    parser.option("-w", "--workdir", metavar="DIR", help="working directory")
    parser.option("-u", "--user", metavar="USER[:GROUP]", help="user, by name or number")
    parser.words("words", at_least=2, options_end=True)


async def _exec(engine: Engine, options: Namespace) -> int:
    if options.tty and options.interactive and not options.detach and not terminal.is_terminal(0):
        raise UsageError("the input device is not a TTY: leave out -t, or run from a terminal")
    request = _request(options)
    if not (request.detach or request.open_stdin or request.tty):
        return await _run(engine, request)
    identity = (await engine.call(engine.execs.Create, request)).exec_id
    if options.detach:
        await engine.call(engine.execs.Start, pb.StartExecRequest(exec_id=identity), resumes=True)
        return 0
    start = pb.AttachStart(exec_id=identity, output=True, input=request.open_stdin)
    session = Session(engine, engine.execs.Attach, start, interactive=request.open_stdin)

    async def start_attached() -> None:
        await session.attach()
        # One that was started, by a call whose answer was lost, is left alone.
        await engine.call(engine.execs.Start, pb.StartExecRequest(exec_id=identity), resumes=True)

    foreground = Foreground(session, tty=request.tty, interactive=request.open_stdin, forward=None)
    try:
        async with foreground.taken():
            await foreground.unless_ended(start_attached())
            foreground.begin()
            return await foreground.until_exit(exec_exit(engine, identity))
    finally:
        await session.close()


async def _run(engine: Engine, request: pb.CreateExecRequest) -> int:
    run = ExecRun(engine, request)
    foreground = Foreground(run, tty=False, interactive=False, forward=None)
    async with foreground.taken():
        return await foreground.until_exit(run.exit())


def _request(options: Namespace) -> pb.CreateExecRequest:
    container, *command = options.words
    request = pb.CreateExecRequest(
        container=container,
        command=command,
        env=values.environment(options.env, options.env_file),
        working_dir=options.workdir,
        user=options.user,
        tty=options.tty,
        open_stdin=options.interactive and not options.detach,
        privileged=options.privileged,
        detach=options.detach,
    )
    if options.tty:
        request.width, request.height = terminal.size()
    return request


COMMANDS = {"exec": Command(_arguments, _exec)}
