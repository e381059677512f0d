"""The shim factory: a warmed-up process that forks shims.

Starting an interpreter with grpcio takes 100 ms and more, a fork of one that has everything
imported takes a few. The factory imports all that a shim needs, freezes the garbage collector's
view of it (so that collections in the children do not copy pages), and never starts gRPC, which
must not be forked. It is single-threaded and holds nothing beyond a request.

Protocol: SOCK_SEQPACKET; one JSON request per connection, one JSON reply, which the shim itself
sends once it serves, on the connection that it inherited. The factory ends when its standard input,
a pipe from containerd, is closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import json
import os
import selectors
import signal
import socket
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

import structlog

from services.common import VERSION, linux
from services.common import log as logs
from services.common.errors import TheseusError
from services.common.server import socket_group
from services.shim import shim_cgroup
from services.shim.app import Shim
from services.shim.config import ShimConfig
from services.shim.metrics import ShimMetrics

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from services.shim.reexec import Successor

log = structlog.get_logger(__name__)

REQUEST_MAX_BYTES = 65536
_REQUEST_LIMIT_S = 5.0
_BACKLOG = 128
_LATE_IMPORTS = (
    "concurrent.futures.thread",
    "google.rpc.error_details_pb2",
    "google.rpc.status_pb2",
    "grpc_reflection.v1alpha.reflection",
)


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A connection whose request has not come yet."""

    connection: socket.socket
    deadline: float


class Factory:
    """Forks a shim for each request on ``path``."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._selector = selectors.DefaultSelector()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._waiting: dict[int, _Waiting] = {}
        self._inode = 0
        self._home = shim_cgroup.Home()
        # Made once, for the children to share as long as they do not count anything.
        self._metrics = ShimMetrics()

    def run(self) -> None:
        """Serve until standard input is closed."""
        _warm_up()
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps the children
        signal.signal(signal.SIGTERM, _exit_quietly)
        signal.signal(signal.SIGINT, _exit_quietly)
        self._home.enter()
        try:
            self._listen()
            log.info("factory serves", socket=str(self._path), version=VERSION)
            self._serve()
        finally:
            self._unlink()
            self._home.leave()

    def _listen(self) -> None:
        new = self._path.with_name(f"{self._path.name}.new")
        new.unlink(missing_ok=True)
        self._listener.bind(str(new))
        new.chmod(0o600)
        self._listener.listen(_BACKLOG)
        self._listener.setblocking(False)
        self._inode = new.stat().st_ino
        new.rename(self._path)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(sys.stdin.fileno(), selectors.EVENT_READ)

    def _unlink(self) -> None:
        # A new containerd's factory may have put its own socket in this place.
        with contextlib.suppress(FileNotFoundError):
            if self._path.stat().st_ino == self._inode:
                self._path.unlink()

    def _serve(self) -> None:
        while True:
            for key, _ in self._selector.select(_REQUEST_LIMIT_S if self._waiting else None):
                if key.fileobj is self._listener:
                    self._accept()
                elif key.fd == sys.stdin.fileno():
                    if not os.read(key.fd, 4096):
                        return
                else:
                    self._request(self._waiting[key.fd].connection)
            self._drop_silent()

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:  # gone again, or out of descriptors: others may still be served
            return
        connection.setblocking(False)
        fd = connection.fileno()
        self._waiting[fd] = _Waiting(connection, time.monotonic() + _REQUEST_LIMIT_S)
        self._selector.register(connection, selectors.EVENT_READ)

    def _request(self, connection: socket.socket) -> None:
        self._forget(connection)
        try:
            config = read_request(connection.recv(REQUEST_MAX_BYTES + 1))
            self._fork(config, connection)
        except TheseusError as error:
            log.warning("request refused", error=error.message)
            reply(connection, {"error": error.message})
        except OSError as error:
            log.error("request failed", error=str(error))
            reply(connection, {"error": f"the shim factory cannot fork a shim: {error.strerror}"})
        finally:
            connection.close()

    def _fork(self, config: ShimConfig, connection: socket.socket) -> None:
        if os.fork() == 0:
            self._leave_to_child(connection)
            run_child(config, self._metrics, lambda answer: _answer_and_close(connection, answer))

    def _leave_to_child(self, connection: socket.socket) -> None:
        """In the child: keep nothing of the factory but this connection."""
        self._selector.close()
        self._listener.close()
        for waiting in self._waiting.values():
            if waiting.connection is not connection:
                waiting.connection.close()

    def _forget(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        del self._waiting[connection.fileno()]

    def _drop_silent(self) -> None:
        now = time.monotonic()
        for waiting in [one for one in self._waiting.values() if one.deadline <= now]:
            self._forget(waiting.connection)
            waiting.connection.close()


def read_request(data: bytes) -> ShimConfig:
    """The settings in a request.

    Raises:
        TheseusError: it is not one.
    """
    if len(data) > REQUEST_MAX_BYTES:
        raise TheseusError(f"the request is larger than {REQUEST_MAX_BYTES} bytes")
    try:
        request = json.loads(data)
    except ValueError as error:
        raise TheseusError("the request is not valid JSON") from error
    if not isinstance(request, dict):
        raise TheseusError("the request is not a JSON object")
    return ShimConfig.from_request(request)


def reply(connection: socket.socket, answer: dict[str, object]) -> None:
    """Send a reply; a peer that is gone does not care."""
    with contextlib.suppress(OSError):
        connection.send(json.dumps(answer).encode())


def run_child(
    config: ShimConfig, metrics: ShimMetrics, answer: Callable[[dict[str, object]], None]
) -> NoReturn:
    """Become the shim of ``config``; never returns to the factory's code."""
    status = 1
    try:
        _detach(config)
        asyncio.run(run_shim(config, metrics, answer))
        status = 0
    except TheseusError as error:
        answer({"error": error.message})
    except OSError as error:
        answer({"error": f"the shim cannot start: {error.strerror}: {error.filename}"})
    except Exception as error:
        log.error("shim failed", exc_info=error)
        answer({"error": f"the shim failed: {type(error).__name__}: see {config.bundle}/shim.log"})
    finally:
        sys.stderr.flush()
        os._exit(status)


async def run_shim(
    config: ShimConfig,
    metrics: ShimMetrics,
    serving: Callable[[dict[str, object]], None],
    successor: Successor | None = None,
) -> None:
    """Run a shim in this process, or go on with one as its ``successor``."""
    logs.configure("shim", config.log_level)
    structlog.contextvars.bind_contextvars(namespace=config.namespace, shim_id=config.id)
    if config.request_id and successor is None:
        log.info("shim starts", request_id=config.request_id)
    await Shim(config, metrics, successor).run(serving)


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


def _warm_up() -> None:
    """Import what is imported late otherwise, and set the collector aside."""
    for name in _LATE_IMPORTS:
        importlib.import_module(name)
    socket_group()
    gc.collect()
    gc.freeze()


def _exit_quietly(signum: int, frame: object) -> None:
    raise SystemExit(0)
