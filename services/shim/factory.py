"""The shim factory: a warmed-up process that forks shims.

Starting an interpreter with grpcio takes 100 ms and more, a fork of one that has everything
imported takes a few. The factory imports all that a shim needs, rehearses a shim's life
(``rehearsal.py``), packs its memory (``packing.py``), and never starts gRPC, which must not be
forked. It is single-threaded.

Nearly all of the time in which a shim comes up goes by before anything depends on its container:
the fork, the event loop, its objects, its server. A shim that waits ready (``waiting.py``) has that
behind it.

Between two forks it does as little as can be, for what it writes to between them is no longer
shared with the shims that exist: it accepts a connection and forks. The child reads the request.

Protocol: SOCK_SEQPACKET; one JSON request per connection, one JSON reply, which the shim itself
sends once it serves, on the connection that it inherited. A request ``{"wait_in": DIRECTORY}`` is
answered by a process that then waits for the real one. The factory ends when its standard input, a
pipe from containerd, is closed.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import os
import select
import signal
import socket
import sys
from typing import TYPE_CHECKING

import structlog

from services.common import VERSION, tracing
from services.common.frozen import compile_all
from services.common.sockets import Place, socket_group
from services.shim import packing, shim_cgroup, spared_imports
from services.shim.app import Shim
from services.shim.birth import be_asked, reply
from services.shim.metrics import ShimMetrics
from services.shim.runtimes import programs, sealed

if TYPE_CHECKING:
    from pathlib import Path

log = structlog.get_logger(__name__)

_BACKLOG = 128
_LATE_IMPORTS = (
    "concurrent.futures.thread",
    "google.rpc.error_details_pb2",
    "google.rpc.status_pb2",
)


class Factory:
    """Forks a shim for each request on ``path``."""

    def __init__(self, path: Path) -> None:
        self._place = Place(path)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._home = shim_cgroup.Home()

    def run(self) -> None:
        """Serve until standard input is closed."""
        packing.share_one_heap()
        warm_up()
        shim = asyncio.run(_prepared())
        sealed.keep(programs.installed(sealed.PROGRAMS))
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps the children
        signal.signal(signal.SIGTERM, _exit_quietly)
        signal.signal(signal.SIGINT, _exit_quietly)
        self._home.enter()
        if self._home.skipped:
            log.debug("cgroups cannot be entered", cgroups=self._home.skipped)
        try:
            self._listen()
            log.info("factory serves", socket=str(self._place.path), version=VERSION)
            packing.pack()
            self._serve(shim)
        finally:
            self._place.leave()
            self._home.leave()

    def _listen(self) -> None:
        new = self._place.new
        new.unlink(missing_ok=True)
        self._listener.bind(str(new))
        new.chmod(0o600)
        self._listener.listen(_BACKLOG)
        self._listener.setblocking(False)
        self._place.take()

    def _serve(self, shim: Shim) -> None:
        stdin, listener = sys.stdin.fileno(), self._listener.fileno()
        poll = select.poll()
        poll.register(listener, select.POLLIN)
        poll.register(stdin, select.POLLIN)
        while True:
            for fd, _ in poll.poll():
                if fd == listener:
                    self._accept(shim)
                elif not os.read(fd, 4096):
                    return

    def _accept(self, shim: Shim) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:  # gone again, or out of descriptors: others may still be served
            return
        sealed.renew()
        try:
            if os.fork() == 0:
                self._listener.close()
                be_asked(connection, shim)
        except OSError as error:
            log.error("fork failed", error=str(error))
            reply(connection, {"error": f"the shim factory cannot fork a shim: {error.strerror}"})
        connection.close()


async def _prepared() -> Shim:
    """The shim that each child is at first: its objects are made once, and shared by all."""
    shim = Shim(ShimMetrics())
    await shim.prepare()
    return shim


def warm_up() -> None:
    """Import what is imported late otherwise, and let a shim live once for practice."""
    # Imported late: it imports this process' own parts.
    from services.shim.rehearsal import rehearse, trace

    tracing.prepare()
    # asyncio looks at it whenever a handler comes or goes, and has an enum made of each signal: 12
    # times in the life of a shim, a tenth of its processor time. Nor does anybody need former
    # handlers as enums.
    signal.valid_signals = functools.cache(signal.valid_signals)
    signal._int_to_enum = _as_it_is  # type: ignore[attr-defined]
    for name in _LATE_IMPORTS:
        importlib.import_module(name)
    socket_group()
    compile_all()
    try:
        packing.gather(trace())
        rehearse()
    except Exception as error:
        # A shim works without, whatever was wrong; it has more memory of its own then.
        log.warning("rehearsal of a shim failed", exc_info=error)
    spared_imports.let_in()


def _as_it_is(value: object, enum: object) -> object:
    return value


def _exit_quietly(signum: int, frame: object) -> None:
    raise SystemExit(0)
