"""The commands: one module for each, or for a few that belong together.

ENTRIES names them all, so that a command's module is imported only when it is used. Such a module
has a dictionary ``COMMANDS`` from its commands' names to :class:`Command`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Awaitable, Callable

    from services.cli.engine import Engine
    from services.cli.parser import Parser


class Command(NamedTuple):
    """What a command takes and does.

    Attributes:
        arguments: declares its options.
        run: does it; the result is the exit code.
        failure: exit code when the engine refuses.
    """

    arguments: Callable[[Parser], None]
    run: Callable[[Engine, Namespace], Awaitable[int]]
    failure: int = 1


class Entry(NamedTuple):
    """Where a command lives, and what its help says."""

    module: str
    usage: str
    summary: str


def _entry(module: str, usage: str, summary: str) -> Entry:
    return Entry(f"services.cli.commands.{module}", usage, summary)


_ONE_OR_MORE = "[OPTIONS] CONTAINER [CONTAINER...]"

ENTRIES = {
    "run": _entry("run", "[OPTIONS] IMAGE [COMMAND] [ARG...]", "Run a command in a new container"),
    "exec": _entry(
        "exec", "[OPTIONS] CONTAINER COMMAND [ARG...]", "Run a command in a running container"
    ),
    "ps": _entry("ps", "[OPTIONS]", "List containers"),
    "pull": _entry("images", "[OPTIONS] NAME[:TAG|@DIGEST]", "Download an image from a registry"),
    "images": _entry("images", "[OPTIONS] [REPOSITORY[:TAG]]", "List images"),
    "load": _entry("images", "[OPTIONS]", "Take images in from an archive"),
    "rmi": _entry("images", "[OPTIONS] IMAGE [IMAGE...]", "Remove images"),
    "create": _entry(
        "run", "[OPTIONS] IMAGE [COMMAND] [ARG...]", "Create a container without starting it"
    ),
    "start": _entry("start", _ONE_OR_MORE, "Start stopped containers"),
    "attach": _entry("start", "[OPTIONS] CONTAINER", "Couple the terminal with a container"),
    "logs": _entry("logs", "[OPTIONS] CONTAINER", "Print the output of a container"),
    "stop": _entry("lifecycle", _ONE_OR_MORE, "Stop running containers"),
    "kill": _entry("lifecycle", _ONE_OR_MORE, "Send a signal to running containers"),
    "wait": _entry(
        "lifecycle",
        "CONTAINER [CONTAINER...]",
        "Wait until containers have stopped, then print their exit codes",
    ),
    "rm": _entry("lifecycle", _ONE_OR_MORE, "Remove containers"),
    "inspect": _entry(
        "inspect", "[OPTIONS] NAME|ID [NAME|ID...]", "Print all about containers or images"
    ),
    "volume": _entry("volume", "ls|create|rm [OPTIONS] [VOLUME...]", "Manage volumes"),
    "version": _entry("system", "", "Print the versions of all tiers"),
    "info": _entry("system", "", "Print the state of the engine"),
    "upgrade": _entry(
        "upgrade", "shim --all | CONTAINER [CONTAINER...]", "Replace shims under their containers"
    ),
    "up": _entry(
        "up", "[OPTIONS]", "Run containerd and the daemon in the foreground, until interrupted"
    ),
}


def overview() -> str:
    """The text of ``theseus --help``."""
    lines = [
        "Usage:  theseus [OPTIONS] COMMAND [ARG...]",
        "",
        "A container engine whose every tier can be replaced while containers run",
        "",
        "Commands:",
        *(f"  {name:<9} {entry.summary}" for name, entry in ENTRIES.items()),
        "",
        "Options:",
        "  -H, --host SOCKET   the daemon's socket, unix:///PATH or a path (env THESEUS_HOST)",
        "  -D, --debug         show the traceback of a failure",
        "  -v, --version       print the version",
        "",
        "Run 'theseus COMMAND --help' for more about a command.",
    ]
    return "\n".join(lines) + "\n"
