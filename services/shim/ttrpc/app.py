"""Builds a shim that speaks ttrpc out of its parts and runs it from its birth to its end.

It ends when containerd asked for it (Shutdown) and has taken every event. Its files are in the
bundle of the container that it was started for, which containerd removes before the last event is
taken: events are therefore kept in memory too.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from services.common import VERSION, linux
from services.common import log as logs
from services.common.background import Background
from services.common.ttrpc.server import TtrpcServer, methods
from services.shim.bundle import Bundle
from services.shim.home import Home
from services.shim.measures import Unmeasured
from services.shim.reaper import Reaper
from services.shim.spool import Spool
from services.shim.surroundings import Surroundings
from services.shim.tasks import Defaults, Tasks
from services.shim.ttrpc import home
from services.shim.ttrpc.events import EventForwarder
from services.shim.ttrpc.task import StockTaskApi, services

if TYPE_CHECKING:
    from services.shim.ttrpc.request import StartRequest

log = structlog.get_logger(__name__)

_RUNTIME_LIMIT_S = 60.0
_FINAL_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def run(request: StartRequest, listener: int) -> None:
    """Be the shim of ``request``, serving the socket with descriptor ``listener``."""
    linux.set_process_name("theseus-shim")
    logs.configure("shim", request.log_level)
    structlog.contextvars.bind_contextvars(namespace=request.namespace, shim_id=request.id)
    if request.shim_cgroup:
        for failure in home.enter_cgroup(request.shim_cgroup):
            log.warning("shim stays in its cgroup", reason=failure)
    asyncio.run(TtrpcShim(request).run(socket.socket(fileno=listener)))


class TtrpcShim:
    """One shim under a stock containerd. Make it outside of the event loop, then ``run`` it."""

    def __init__(self, request: StartRequest) -> None:
        self._request = request
        self._path: str = ""

    async def run(self, listener: socket.socket) -> None:
        """Serve until the end."""
        self._path = listener.getsockname()
        request = self._request
        bundle = Bundle(Path(request.bundle))
        reaper = Reaper()
        spool = Spool(bundle.spool, keep=True)
        loop = asyncio.get_running_loop()
        async with Background() as background:
            around = Surroundings(
                namespace=request.namespace,
                reaper=reaper,
                events=spool,
                metrics=Unmeasured(),
                background=background,
            )
            all_at_home = Home(bundle, around)
            defaults = Defaults(
                namespace=request.namespace,
                runtime="runc",
                # With containerd's own address that is upstream's /run/containerd/runc.
                runtime_state=Path(request.address).parent,
                runtime_timeout_s=_RUNTIME_LIMIT_S,
            )
            tasks = Tasks(
                reaper=reaper, find_home=lambda _id: all_at_home, defaults=lambda: defaults
            )
            for signum in _FINAL_SIGNALS:
                loop.add_signal_handler(signum, _signalled, signum, tasks)
            reaper.start()
            server = TtrpcServer(methods(services(StockTaskApi(tasks, home=bundle.path))))
            await server.start(listener)
            log.info("shim serves", socket=self._path, pid=os.getpid(), version=VERSION)
            events = EventForwarder(
                Path(request.ttrpc_address), namespace=request.namespace, spool=spool
            )
            background.start(events.run(), name="events")
            await tasks.shutdown.wait()
            # At once, so that a new container of the same name gets a shim of its own.
            self._unlink()
            server.stop_listening()
            await tasks.finish()
            spool.leave_directory()
            if not tasks.shutdown_now.is_set():
                await spool.emptied()
            await server.stop()
        reaper.stop()
        log.info("shim ends")

    def _unlink(self) -> None:
        Path(self._path).unlink(missing_ok=True)


def _signalled(signum: int, tasks: Tasks) -> None:
    if len(tasks):
        log.warning("signal ignored, there are containers", signal=signum)
        return
    log.info("ending on a signal", signal=signum)
    tasks.request_shutdown(now=True)
