"""How the program of a tier runs: what fails becomes a sentence, a signal becomes a stop."""

from __future__ import annotations

import asyncio
import gc
import importlib
import os
import signal
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from services.common import tracing
from services.common.errors import PermissionDenied, TheseusError
from services.common.late_modules import PROTOBUF_IN_PYTHON, load_late

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

_EXPERIMENTS = "GRPC_EXPERIMENTS"


def run(name: str, work: Callable[[], None]) -> int:
    """Exit status of ``work``: 0, or 1 after a sentence on standard error."""
    try:
        work()
    except TheseusError as error:
        sys.stderr.write(f"{name}: {error.message}\n")
        return 1
    except OSError as error:
        sys.stderr.write(f"{name}: cannot start: {error}\n")
        return 1
    finally:
        tracing.flush()
    return 0


def import_grpc() -> None:
    """Import gRPC so that the thread which wakes us reads its sockets too; call it first.

    grpc.aio has a thread that waits for completed operations. gRPC's event engine has others that
    wait for sockets, and hand over to it: 11 changes of threads for a call, and a fifth of its
    processor time. Without the event engine for sockets that one thread does both: 6 changes.
    What the environment says of experiments goes first.

    Of protobuf, which comes after it, a part is not loaded.
    """
    load_late(PROTOBUF_IN_PYTHON)
    if _EXPERIMENTS in os.environ:
        importlib.import_module("grpc")
        return
    os.environ[_EXPERIMENTS] = "-event_engine_client,-event_engine_listener"
    try:
        importlib.import_module("grpc")
    finally:
        del os.environ[_EXPERIMENTS]  # it is read by now, and no business of children


def run_loop(main: Coroutine[Any, Any, None]) -> None:
    """As ``asyncio.run``, on libuv's loop: most of what these tiers do are short turns of it."""
    # Imported late: --help and shims have no need of it.
    from services.common.loop import run as run_to_end

    run_to_end(main)


def require_root(name: str, reason: str) -> None:
    """Refuse to go on without privilege.

    Raises:
        PermissionDenied: this is not root.
    """
    if os.geteuid() != 0:
        raise PermissionDenied(f"{name} {reason}: run it as root")


@contextmanager
def starting() -> Iterator[None]:
    """A start, in which nothing is collected: nearly all that it makes stays to the end.

    What is there afterwards is not looked at by later collections either.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def stop_signals() -> asyncio.Event:
    """An event that SIGTERM and SIGINT set from now on."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    return stop
