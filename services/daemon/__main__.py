"""The ``theseus-daemon`` program: reads its command line, serves until it is told to stop."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from typing import TYPE_CHECKING

import structlog

from services.common import log as logs
from services.common.errors import PermissionDenied, TheseusError
from services.daemon.config import parse

if TYPE_CHECKING:
    from services.daemon.config import Config

log = structlog.get_logger(__name__)


def main() -> int:
    """Run the program; returns its exit status."""
    try:
        config = parse()
        logs.configure("daemon", config.log_level)
        if os.geteuid() != 0:
            raise PermissionDenied("theseus-daemon mounts and sets up networks: run it as root")
        asyncio.run(_serve(config))
    except TheseusError as error:
        sys.stderr.write(f"theseus-daemon: {error.message}\n")
        return 1
    except OSError as error:
        sys.stderr.write(f"theseus-daemon: {error.strerror}: {error.filename}\n")
        return 1
    return 0


async def _serve(config: Config) -> None:
    # Imported late: --help and a wrong option need nothing of it.
    from services.daemon.app import App

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with App(config):
        await stop.wait()
        log.info("stopping")


if __name__ == "__main__":
    sys.exit(main())
