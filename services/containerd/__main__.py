"""The ``theseus-containerd`` program: reads its command line, serves until it is told to stop."""

from __future__ import annotations

import sys
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import structlog

from services.common import log as logs
from services.common import program, tracing
from services.containerd.config import parse

if TYPE_CHECKING:
    from services.containerd.config import Config

log = structlog.get_logger(__name__)

NAME = "theseus-containerd"


def main() -> int:
    """Run the program; returns its exit status."""
    if sys.argv[1:2] == ["check"]:
        # Imported late: the service has no need of it.
        from services.containerd.check.program import main as check

        return check(sys.argv[2:])
    if sys.argv[3:4] == ["publish"] and sys.argv[1] in ("--address", "-address"):
        from services.containerd.clients.publish import main as publish

        return publish(["--address", *sys.argv[2:]])
    return program.run(NAME, _run)


def _run() -> None:
    config = parse()
    logs.configure("containerd", config.log_level)
    program.require_root(NAME, "mounts and makes devices")
    program.import_grpc()
    tracing.configure(NAME)
    program.run_loop(_serve(config))


async def _serve(config: Config) -> None:
    stop = program.stop_signals()
    async with AsyncExitStack() as stack:
        with program.starting():
            # Imported late: --help and a wrong option need nothing of it.
            from services.containerd.app import App

            await stack.enter_async_context(App(config))
        await stop.wait()
        log.info("stopping", drain_s=config.drain_s)


if __name__ == "__main__":
    sys.exit(main())
