"""The ``theseus-daemon`` program: reads its command line, serves until it is told to stop."""

from __future__ import annotations

import sys
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import structlog

from services.common import log as logs
from services.common import program, tracing
from services.daemon.config import parse

if TYPE_CHECKING:
    from services.daemon.config import Config

log = structlog.get_logger(__name__)

NAME = "theseus-daemon"


def main() -> int:
    """Run the program; returns its exit status."""
    return program.run(NAME, _run)


def _run() -> None:
    config = parse()
    logs.configure("daemon", config.log_level)
    program.require_root(NAME, "mounts and sets up networks")
    program.import_grpc()
    tracing.configure(NAME)
    program.run_loop(_serve(config))


async def _serve(config: Config) -> None:
    stop = program.stop_signals()
    async with AsyncExitStack() as stack:
        with program.starting():
            # Imported late: --help and a wrong option need nothing of it.
            from services.daemon.app import App

            await stack.enter_async_context(App(config))
        await stop.wait()
        log.info("stopping")


if __name__ == "__main__":
    sys.exit(main())
