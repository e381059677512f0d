"""A process in the foreground: its streams, its terminal, its signals and its exit code are ours.

Without a terminal in the container, signals that reach us go to the process. With one, the keys
that make signals are passed on as they are, and signals from elsewhere end only ourselves.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from contextlib import ExitStack, asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, Protocol

from protos.theseus.engine.v1 import containers_pb2 as pb
from services.cli import terminal
from services.cli.failure import warn
from services.common.errors import FailedPrecondition, NotFound, TheseusError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine

    from services.cli.engine import Engine

_PROXIED = (
    signal.SIGHUP,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGTERM,
    signal.SIGUSR1,
    signal.SIGUSR2,
)
_ENDING = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
_INSISTENT = 3
"""So many interrupts end ourselves, when the container does not end."""

_LOST = 125


class Coupled(Protocol):
    """The standard streams of a process, coupled with ours; see :class:`Session`."""

    detached: asyncio.Event

    def started(self, *, detachable: bool = False) -> None:
        """The process runs."""

    def resize(self) -> None:
        """Tell the process the size that our terminal has now."""

    async def written(self) -> None:
        """Returns when all output was written."""


class Foreground:
    """What the user has to do with a process while it runs.

    Args:
        session: its streams, attached.
        tty: whether it has a terminal.
        interactive: whether it has our input.
        forward: passes a signal on, by name; None when signals end only ourselves.
    """

    def __init__(
        self,
        session: Coupled,
        *,
        tty: bool,
        interactive: bool,
        forward: Callable[[str], Awaitable[object]] | None,
    ) -> None:
        self._session = session
        self._tty = tty
        self._keys = tty and interactive and terminal.is_terminal(0)
        self._forward = forward if not tty else None
        self._forwarding: set[asyncio.Future[object]] = set()
        self._interrupts = 0
        self._begun = False
        self._early: list[signal.Signals] = []
        self._ended_by: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    @asynccontextmanager
    async def taken(self) -> AsyncIterator[None]:
        """Have the signals, and the terminal if need be, inside the block."""
        loop = asyncio.get_running_loop()
        with ExitStack() as stack:
            for number in _PROXIED if self._forward else _ENDING:
                loop.add_signal_handler(number, self._signalled, number)
                stack.callback(loop.remove_signal_handler, number)
            if self._tty:
                loop.add_signal_handler(signal.SIGWINCH, self._session.resize)
                stack.callback(loop.remove_signal_handler, signal.SIGWINCH)
            if self._keys:
                stack.enter_context(terminal.raw(0))
            yield

    async def unless_ended(self, work: Coroutine[Any, Any, None]) -> None:
        """Await ``work``, which makes the process run.

        Raises:
            KeyboardInterrupt: the user ended us first, or insisted.
        """
        task = asyncio.ensure_future(work)
        outcomes: list[asyncio.Future[Any]] = [task, self._ended_by]
        try:
            await asyncio.wait(outcomes, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise KeyboardInterrupt
            task.result()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def begin(self) -> None:
        """The process runs now."""
        if self._tty:
            self._session.resize()
        self._session.started(detachable=self._keys)
        self._begun = True
        for number in self._early:
            self._pass_on(number)

    async def until_exit(self, waiting: Awaitable[pb.ExitStatus]) -> int:
        """The process' exit code; 0 once the user detached; 128+n when a signal ended us.

        Raises:
            TheseusError: the engine went away for good.
        """
        exited = asyncio.ensure_future(waiting)
        written = asyncio.ensure_future(self._session.written())
        detached = asyncio.ensure_future(self._session.detached.wait())
        both = asyncio.gather(exited, written)
        outcomes: list[asyncio.Future[Any]] = [both, detached, self._ended_by]
        try:
            await asyncio.wait(outcomes, return_when=asyncio.FIRST_COMPLETED)
            if self._ended_by.done():
                return self._ended_by.result()
            if detached.done():
                sys.stderr.write("read escape sequence\r\n")
                return 0
            return exit_code(both.result()[0])
        finally:
            outcomes += self._forwarding
            for future in outcomes:
                future.cancel()
            await asyncio.gather(*outcomes, return_exceptions=True)

    def _signalled(self, number: signal.Signals) -> None:
        if number in (signal.SIGINT, signal.SIGTERM):
            self._interrupts += 1
        if self._forward is None or self._interrupts >= _INSISTENT:
            if not self._ended_by.done():
                self._ended_by.set_result(128 + number)
        elif self._begun:
            self._pass_on(number)
        else:
            self._early.append(number)  # nothing runs yet that could hear it

    def _pass_on(self, number: signal.Signals) -> None:
        assert self._forward is not None
        task = asyncio.ensure_future(self._forward(number.name))
        self._forwarding.add(task)
        task.add_done_callback(self._forwarded)

    def _forwarded(self, task: asyncio.Future[object]) -> None:
        self._forwarding.discard(task)
        # One that is not running has no use for a signal; anything else the user should know.
        with suppress(asyncio.CancelledError, FailedPrecondition, NotFound):
            try:
                task.result()
            except TheseusError as error:
                if isinstance(error, FailedPrecondition | NotFound):
                    raise
                warn(f"the signal could not be passed on: {error.message}")


async def container_exit(engine: Engine, identity: str, *, removed: bool = False) -> pb.ExitStatus:
    """How a container's run ended; waits for its removal too where it removes itself."""
    conditions = pb.WaitContainerRequest
    request = pb.WaitContainerRequest(
        container=identity,
        condition=conditions.CONDITION_REMOVED if removed else conditions.CONDITION_UNSPECIFIED,
    )
    return (await engine.wait(engine.containers.Wait, request)).exit


def exit_code(status: pb.ExitStatus) -> int:
    """The exit code that stands for ``status``."""
    if status.lost:
        warn(f"how the process ended cannot be known: {status.error or 'its record is lost'}")
        return _LOST
    return status.code
