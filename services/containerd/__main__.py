"""The ``theseus-containerd`` program: reads its command line, serves until it is told to stop."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from typing import TYPE_CHECKING

import structlog

from services.common import log as logs
from services.common.errors import PermissionDenied, TheseusError
from services.containerd.config import parse

if TYPE_CHECKING:
    from services.containerd.config import Config

log = structlog.get_logger(__name__)


def main() -> int:
    """Run the program; returns its exit status."""
    try:
        config = parse()
        logs.configure("containerd", config.log_level)
        if os.geteuid() != 0:
            raise PermissionDenied("theseus-containerd mounts and makes devices: run it as root")
        asyncio.run(_serve(config))
    except TheseusError as error:
        sys.stderr.write(f"theseus-containerd: {error.message}\n")
        return 1
    except OSError as error:
        sys.stderr.write(f"theseus-containerd: cannot start: {error}\n")
        return 1
    return 0


async def _serve(config: Config) -> None:
    # Imported late: --help and a wrong option need nothing of it.
    from services.containerd.app import App

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with App(config):
        await stop.wait()
        log.info("stopping", drain_s=config.drain_s)


if __name__ == "__main__":
    sys.exit(main())
