"""The shim factory: a warmed-up process that forks shims.

Starting an interpreter with grpcio takes 100 ms and more, a fork of one that has everything
imported takes a few. The factory imports all that a shim needs, rehearses a shim's life
(``rehearsal.py``), packs its memory (``packing.py``), and never starts gRPC, which must not be
forked. It is single-threaded.

Half of the time in which a shim comes up goes by before anything depends on its container: the
fork, the event loop, the listening socket. A shim that waits ready has that behind it. It ends when
the connection on which it waits is closed, which the kernel does for a containerd that dies.

Between two forks it does as little as can be, for what it writes to between them is no longer
shared with the shims that exist: it accepts a connection and forks. The child reads the request.

Protocol: SOCK_SEQPACKET; one JSON request per connection, one JSON reply, which the shim itself
sends once it serves, on the connection that it inherited. A request ``{"wait_in": DIRECTORY}`` is
answered by a process that then waits for the real one. The factory ends when its
standard input, a pipe from containerd, is closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import structlog

from services.common import VERSION, linux, tracing
from services.common import log as logs
from services.common.errors import TheseusError
from services.common.sockets import Place, socket_group
from services.shim import packing, shim_cgroup
from services.shim.app import Shim
from services.shim.config import ShimConfig, waiting_name
from services.shim.metrics import ShimMetrics
from services.shim.rpc.server import Listener, listen
from services.shim.runtimes import programs, sealed

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from services.shim.reexec import Successor

log = structlog.get_logger(__name__)

REQUEST_MAX_BYTES = 65536
_REQUEST_LIMIT_S = 5.0
# Of objects made: a shim has few, and lives on; collecting every 700 took a sixth of its time.
_COLLECT_EVERY = 20_000
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
        # Made once, for the children to share as long as they do not count anything.
        self._metrics = ShimMetrics()

    def run(self) -> None:
        """Serve until standard input is closed."""
        packing.share_one_heap()
        warm_up()
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
            self._serve()
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

    def _serve(self) -> None:
        stdin, listener = sys.stdin.fileno(), self._listener.fileno()
        poll = select.poll()
        poll.register(listener, select.POLLIN)
        poll.register(stdin, select.POLLIN)
        while True:
            for fd, _ in poll.poll():
                if fd == listener:
                    self._accept()
                elif not os.read(fd, 4096):
                    return

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:  # gone again, or out of descriptors: others may still be served
            return
        sealed.renew()
        try:
            if os.fork() == 0:
                self._listener.close()
                run_child(connection, self._metrics)
        except OSError as error:
            log.error("fork failed", error=str(error))
            reply(connection, {"error": f"the shim factory cannot fork a shim: {error.strerror}"})
        connection.close()


def read_request(data: bytes) -> ShimConfig:
    """The settings in a request.

    Raises:
        TheseusError: it is not one.
    """
    return ShimConfig.from_request(_parse(data))


def _parse(data: bytes) -> dict[str, object]:
    if len(data) > REQUEST_MAX_BYTES:
        raise TheseusError(f"the request is larger than {REQUEST_MAX_BYTES} bytes")
    try:
        request = json.loads(data)
    except ValueError as error:
        raise TheseusError("the request is not valid JSON") from error
    if not isinstance(request, dict):
        raise TheseusError("the request is not a JSON object")
    return request


def _waiting_place(data: bytes) -> Path | None:
    """Directory of sockets, where the request is to wait for another one."""
    directory = _parse(data).get("wait_in")
    if directory is None:
        return None
    if not isinstance(directory, str) or not directory.startswith("/"):
        raise TheseusError("'wait_in' must be an absolute path")
    return Path(directory)


def reply(connection: socket.socket, answer: dict[str, object]) -> None:
    """Send a reply; a peer that is gone does not care."""
    with contextlib.suppress(OSError):
        connection.send(json.dumps(answer).encode())


def run_child(connection: socket.socket, metrics: ShimMetrics) -> NoReturn:
    """Become the shim that ``connection`` asks for; never returns to the factory's code."""
    status = 1
    gc.set_threshold(_COLLECT_EVERY)
    try:
        connection.settimeout(_REQUEST_LIMIT_S)
        data = connection.recv(REQUEST_MAX_BYTES + 1)
        if data and (directory := _waiting_place(data)) is not None:
            _run(_wait_and_run(connection, metrics, directory))
        elif data:
            config = read_request(data)
            _detach(config)
            _run(run_shim(config, metrics, lambda answer: _answer_and_close(connection, answer)))
        status = 0
    except TimeoutError:
        log.info("connection without a request")
    except TheseusError as error:
        log.warning("request refused", error=error.message)
        reply(connection, {"error": error.message})
    except OSError as error:
        log.error("shim cannot start", error=str(error))
        reply(connection, {"error": f"the shim cannot start: {error.strerror}: {error.filename}"})
    except Exception as error:
        log.error("shim failed", exc_info=error)
        reply(connection, {"error": f"the shim failed: {type(error).__name__}: see its log"})
    finally:
        sys.stderr.flush()
        os._exit(status)


def _run(work: Coroutine[Any, Any, None]) -> None:
    """Run the process' one piece of work; the process ends with it, so nothing is tidied up."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    loop.run_until_complete(work)


async def _wait_and_run(connection: socket.socket, metrics: ShimMetrics, directory: Path) -> None:
    """Become a shim that waits, and then the one that the next request asks for, if one comes."""
    loop, me = asyncio.get_running_loop(), asyncio.current_task()
    assert me is not None
    for signum in (signal.SIGTERM, signal.SIGINT):  # the factory's handler may raise anywhere
        loop.add_signal_handler(signum, me.cancel)
    path = directory / waiting_name()
    listener = listen(path)
    try:
        linux.set_process_name("theseus-waiting")
        connection.setblocking(False)
        reply(connection, {"waiting": os.getpid()})
        data = await loop.sock_recv(connection, REQUEST_MAX_BYTES + 1)
        if not data:  # nobody wants it any more
            return
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(signum)
        config = read_request(data)
        _detach(config)
        await run_shim(
            config,
            metrics,
            lambda answer: _answer_and_close(connection, answer),
            listener=listener,
        )
    finally:
        listener.socket.close()
        path.unlink(missing_ok=True)  # it is elsewhere once it serves


async def run_shim(
    config: ShimConfig,
    metrics: ShimMetrics,
    serving: Callable[[dict[str, object]], None],
    successor: Successor | None = None,
    *,
    listener: Listener | None = None,
) -> None:
    """Run a shim in this process, or go on with one as its ``successor``."""
    logs.configure("shim", config.log_level)
    tracing.configure("theseus-shim", **{"container.id": config.id})
    structlog.contextvars.bind_contextvars(namespace=config.namespace, shim_id=config.id)
    if config.request_id and successor is None:
        log.info("shim starts", request_id=config.request_id)
    try:
        await Shim(config, metrics, successor, listener=listener).run(serving)
    finally:
        if tracing.requested():
            await asyncio.to_thread(tracing.flush)


def _detach(config: ShimConfig) -> None:
    os.setsid()
    for signum in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, signal.SIG_DFL)
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    os.dup2(null, 0)
    os.dup2(null, 1)
    errors = os.open(
        config.bundle / "shim.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640
    )
    os.dup2(errors, 2)
    os.close(errors)
    os.close(null)
    os.chdir("/")
    linux.set_process_name("theseus-shim")


def _answer_and_close(connection: socket.socket, answer: dict[str, object]) -> None:
    reply(connection, answer)
    connection.close()


def warm_up() -> None:
    """Import what is imported late otherwise, and let a shim live once for practice."""
    # Imported late: it imports this process' own parts.
    from services.shim.rehearsal import rehearse, trace

    tracing.prepare()
    # asyncio looks at it, and makes an enum of each, whenever a handler comes or goes: 12 times in
    # the life of a shim, a tenth of its processor time.
    signal.valid_signals = functools.cache(signal.valid_signals)
    for name in _LATE_IMPORTS:
        importlib.import_module(name)
    socket_group()
    try:
        packing.gather(trace())
        rehearse()
    except Exception as error:
        # A shim works without, whatever was wrong; it has more memory of its own then.
        log.warning("rehearsal of a shim failed", exc_info=error)


def _exit_quietly(signum: int, frame: object) -> None:
    raise SystemExit(0)
