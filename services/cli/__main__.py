"""``theseus``: find the command, parse its options, run it, say in one sentence what went wrong.

Exit codes are docker's: a container's own for ``run``, ``exec`` and ``start --attach``; 126 and 127
for a command that cannot be executed or found; 125 when the engine refused a ``run`` or ``create``,
and for a wrong command line; 1 for any other failure.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING

from services.cli.commands import ENTRIES, overview
from services.cli.parser import Parser, UsageError
from services.common import VERSION
from services.common.late_modules import PROTOBUF_IN_PYTHON, load_late
from services.common.request import new_request_id, request_id

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Sequence

    from services.cli.commands import Command
    from services.cli.engine import Engine
    from services.common.errors import TheseusError

DEFAULT_HOST = "unix:///run/theseus/daemon/daemon.sock"
EXIT_USAGE = 125
_INTERRUPTED = 130
_OUTPUT_CLOSED = 141


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    try:
        return _main(list(sys.argv[1:] if arguments is None else arguments))
    except UsageError as error:
        sys.stderr.write(f"theseus: {error}\n\n{error.hint}\n")
        return EXIT_USAGE
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has gone. Nothing may be flushed into the pipe at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return _OUTPUT_CLOSED


def _main(given: list[str]) -> int:
    options = _global_options(given)
    if options.version:
        sys.stdout.write(f"theseus version {VERSION}\n")
        return 0
    if options.h or not options.command or options.command == ["help"]:
        sys.stdout.write(overview())
        return 0
    name, *rest = options.command
    if name == "help":
        name, rest = rest[0], ["--help"]
    if name not in ENTRIES:
        raise UsageError(f"'{name}' is not a theseus command.", "See 'theseus --help'.")
    entry = ENTRIES[name]
    _import_less()
    command: Command = import_module(entry.module).COMMANDS[name]
    parser = Parser(f"theseus {name}", entry.usage, entry.summary)
    command.arguments(parser)
    try:
        code = _run(command, parser.parse(rest), options)
    except UsageError as error:
        error.hint = error.hint or f"See 'theseus {name} --help'."
        raise
    sys.stdout.flush()
    return code


def _global_options(given: list[str]) -> Namespace:
    parser = Parser("theseus", "[OPTIONS] COMMAND [ARG...]", "")
    host = os.environ.get("THESEUS_HOST") or DEFAULT_HOST
    parser.option("-H", "--host", metavar="SOCKET", default=host, help="the daemon's socket")
    parser.flag("-D", "--debug", help="show the traceback of a failure")
    parser.flag("-v", "--version", help="print the version")
    parser.flag("-h", help="print this")
    parser.words("command", options_end=True)
    if given[:1] == ["--help"]:
        given = ["-h"]
    return parser.parse(given)


def _import_less() -> None:
    """Leave out what commands have no use for, but would import: a tenth of what they take."""
    load_late(PROTOBUF_IN_PYTHON)
    # asyncio does without ssl, and what a command speaks to is a Unix socket.
    sys.modules.setdefault("ssl", None)  # type: ignore[arg-type]  # see importlib: not found


def _run(command: Command, arguments: Namespace, options: Namespace) -> int:
    # Imported late: help and wrong command lines are answered without gRPC and asyncio.
    import asyncio

    from services.cli.engine import Engine
    from services.cli.failure import report
    from services.common.errors import TheseusError

    request_id.set(new_request_id())
    try:
        return asyncio.run(_with_engine(command, arguments, Engine(options.host)))
    except (UsageError, BrokenPipeError):
        raise
    except Exception as error:
        if options.debug:
            import traceback

            traceback.print_exc()
        known = error if isinstance(error, TheseusError) else _fault(error)
        return report(known, otherwise=command.failure)


def _fault(error: Exception) -> TheseusError:
    from services.common.errors import Internal

    what = f"{type(error).__name__}: {error}"
    return Internal(f"internal error of the command, show it with --debug: {what}")


async def _with_engine(command: Command, arguments: Namespace, engine: Engine) -> int:
    async with engine:
        return await command.run(engine, arguments)


if __name__ == "__main__":
    sys.exit(main())
