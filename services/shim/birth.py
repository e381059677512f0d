"""How a forked process becomes a shim, and another one after that.

It is asked on the connection that it was forked for: told at once which shim it is, or to wait for
that. One that waits has its event loop, its objects and its server, and listens where its name is
not yet that of any container (``<directory>/waiting-<pid>``): what is left when it is told is the
container's own.

    ──{"wait_in": …}──▶ {"waiting": …} ──request──▶ {"pid": …} · · · {"waiting": …} ──request──▶ …
                                 ──request──▶ {"pid": …} · · · {"waiting": …} ──request──▶ …

A shim whose container is deleted, and that has delivered everything, waits again if the connection
still stands: a fork, its copied pages and its end are saved. Only one that has led a life without
incident does, and has exactly what it had before that (``possessions.py``); any other ends, and so
does one that waits when the connection is closed, which the kernel does for a containerd that dies.
What a process must not become is the shim of a second container while anybody takes it for that of
the first: it is containerd that sees to that, and gives a request only to a process that it knows
from no other task (see ``services/containerd/tasks/line.py``).
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import signal
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import structlog

from services.common import linux, tracing
from services.common import log as logs
from services.common.errors import TheseusError
from services.shim.app import Shim
from services.shim.config import ShimConfig, waiting_name
from services.shim.metrics import ShimMetrics
from services.shim.possessions import Possessions, left_over
from services.shim.rpc.server import listen

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from services.shim.reexec import Successor

    Serving = Callable[[dict[str, object]], None]

log = structlog.get_logger(__name__)

REQUEST_MAX_BYTES = 65536
LIVES_MAX = 100
"""Containers that a process is the shim of, one after the other: what leaks a little ends."""
_REQUEST_LIMIT_S = 5.0
_SERVICE = "theseus-shim"
# Of objects made: a shim has few, and lives on; collecting every 700 took a sixth of its time.
_COLLECT_EVERY = 20_000


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


def _place(data: bytes, key: str) -> Path | None:
    """Directory of sockets where the process is to wait, under a key of a request."""
    directory = _parse(data).get(key)
    if directory is None:
        return None
    if not isinstance(directory, str) or not directory.startswith("/"):
        raise TheseusError(f"'{key}' must be an absolute path")
    return Path(directory)


def reply(connection: socket.socket, answer: dict[str, object]) -> None:
    """Send a reply; a peer that is gone does not care."""
    with contextlib.suppress(OSError):
        connection.send(json.dumps(answer).encode())


def be_asked(connection: socket.socket, shim: Shim) -> NoReturn:
    """Become what ``connection`` asks for, at first ``shim``; never returns to its caller."""
    status = 1
    gc.set_threshold(_COLLECT_EVERY)
    try:
        connection.settimeout(_REQUEST_LIMIT_S)
        data = connection.recv(REQUEST_MAX_BYTES + 1)
        if data:
            place = _place(data, "wait_in")
            request = None if place is not None else data
            if request is not None:
                place = _place(request, "then_wait_in")
            _detach()
            connection.setblocking(False)
            _run(_Process(connection, place).run(request, shim))
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


async def run_shim(
    config: ShimConfig,
    metrics: ShimMetrics,
    serving: Serving,
    successor: Successor | None = None,
) -> None:
    """Run a shim in this process, or go on with one as its ``successor``."""
    logs.configure("shim", config.log_level)
    await _live(Shim(metrics), config, serving, successor)


def _run(work: Coroutine[Any, Any, None]) -> None:
    """Run the process' one piece of work; the process ends with it, so nothing is tidied up."""
    logs.become("shim")
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    loop.run_until_complete(work)


class _Process:
    """This process, which is a shim at times.

    Args:
        connection: on which it is asked.
        place: directory where it may wait; None: it may not.
    """

    def __init__(self, connection: socket.socket, place: Path | None) -> None:
        self._connection = connection
        self._place = place
        self._lives = 0

    async def run(self, request: bytes | None, shim: Shim) -> None:
        """Be one shim after the other: first ``shim``, that of ``request`` if there is one."""
        # While it waits: it takes milliseconds, and has a thread that goes on from life to life.
        tracing.configure(_SERVICE)
        before = Possessions.now()
        while self._lives < LIVES_MAX:
            executor = ThreadPoolExecutor()
            asyncio.get_running_loop().set_default_executor(executor)
            was_one = await self._be(shim, request)
            executor.shutdown(wait=False)
            self._lives += 1
            if not was_one or not await self._may_go_on(shim, before):
                return
            request, shim = None, Shim(ShimMetrics())

    async def _be(self, shim: Shim, request: bytes | None) -> bool:
        """Be a shim from before its birth to its end; False: nobody wants one any more."""
        if request is not None:
            await self._live(shim, request)
            return True
        me = asyncio.current_task()
        assert me is not None
        assert self._place is not None, "it may wait"
        path = self._place / waiting_name()
        listener = listen(path)
        try:
            linux.set_process_name("theseus-waiting")
            await shim.wait(listener, unwanted=me.cancel)
            reply(self._connection, {"waiting": os.getpid(), **shim.identity})
            if self._lives:
                gc.collect()  # what the earlier container has left; the factory's is out of it
            loop = asyncio.get_running_loop()
            request = await loop.sock_recv(self._connection, REQUEST_MAX_BYTES + 1)
            if not request:
                return False
            await self._live(shim, request)
        finally:
            listener.socket.close()
            path.unlink(missing_ok=True)  # it is elsewhere once it serves
        return True

    async def _live(self, shim: Shim, request: bytes) -> None:
        config = read_request(request)
        _log_into(config.bundle)
        await _live(shim, config, lambda answer: reply(self._connection, answer))

    async def _may_go_on(self, shim: Shim, before: Possessions) -> bool:
        """Whether it may be another container's shim: nothing is left of this one then."""
        if self._place is None or self._has_hung_up():
            return False
        if not shim.without_incident or tracing.stays_connected():
            return False
        if found := await left_over(before):
            reply(self._connection, {"ends": found})
            return False
        logs.describe("info")
        os.dup2(0, 2)  # the former container's log; what goes wrong from now on is a reply
        return True

    def _has_hung_up(self) -> bool:
        try:
            return not self._connection.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True


async def _live(
    shim: Shim, config: ShimConfig, serving: Serving, successor: Successor | None = None
) -> None:
    logs.describe(config.log_level, namespace=config.namespace, shim_id=config.id)
    tracing.configure(_SERVICE, **{"container.id": config.id})
    try:
        await shim.run(config, serving, successor)
    finally:
        if tracing.requested():
            await asyncio.to_thread(tracing.flush)


def _detach() -> None:
    """Have nothing in common with the factory but its standard error, until there is another."""
    os.setsid()
    for signum in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, signal.SIG_DFL)
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.close(null)
    os.chdir("/")


def _log_into(bundle: Path) -> None:
    """Be a container's shim for whoever looks at the processes, and at the bundle."""
    errors = os.open(f"{bundle}/shim.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o640)
    os.dup2(errors, 2)
    os.close(errors)
    linux.set_process_name("theseus-shim")
