"""Who is attached to which container, so that a start can wait for them and a clean-up, too."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from services.daemon.containers.runtime import NewProcess

    Begin = Callable[[NewProcess], Awaitable[int]]


class Opening:
    """A client that attached before there was a task; see :meth:`Sessions.expecting`.

    Args:
        begin: starts a process over the session's own stream, and returns its pid.
    """

    def __init__(self, begin: Begin | None = None) -> None:
        self.begin = begin
        self.made = asyncio.Event()
        """Set when there is a task to couple with, not started yet."""
        self.settled = asyncio.Event()
        """Set by the session when it is coupled, or gives up."""


class Sessions:
    """Counts the attached sessions of each container, and of each exec session."""

    def __init__(self) -> None:
        self._open: dict[str, int] = {}
        self._closed: dict[str, asyncio.Event] = {}
        self._openings: dict[str, list[Opening]] = {}

    @contextmanager
    def expecting(self, key: str, begin: Begin | None = None) -> Iterator[Opening]:
        """Have the next start of ``key`` couple this session before anything runs."""
        opening = Opening(begin)
        self._openings.setdefault(key, []).append(opening)
        try:
            yield opening
        finally:
            opening.settled.set()
            openings = self._openings[key]
            openings.remove(opening)
            if not openings:
                del self._openings[key]

    def expected(self, key: str) -> bool:
        """Whether somebody expects the next start."""
        return key in self._openings

    def begin(self, key: str) -> Begin | None:
        """What starts a process over the stream of a session that expects it, if there is one."""
        waiting = (o for o in self._openings.get(key, ()) if not o.made.is_set())
        return next((opening.begin for opening in waiting if opening.begin is not None), None)

    def made(self, key: str) -> list[Opening]:
        """Tell those who expect it that there is something to couple with; returns them."""
        openings = list(self._openings.get(key, ()))
        for opening in openings:
            opening.made.set()
        return openings

    async def couple(self, key: str, *, timeout_s: float) -> None:
        """As :meth:`made`, and let them couple, for a while."""
        openings = self.made(key)
        with suppress(TimeoutError):  # a session that hangs does not keep anything from starting
            async with asyncio.timeout(timeout_s):
                for opening in openings:
                    await opening.settled.wait()

    @contextmanager
    def attached(self, *keys: str) -> Iterator[None]:
        """Count a session under each key while the block lasts."""
        for key in keys:
            self._open[key] = self._open.get(key, 0) + 1
        try:
            yield
        finally:
            for key in keys:
                self._leave(key)

    def count(self, key: str) -> int:
        """How many are attached now."""
        return self._open.get(key, 0)

    async def finish(self, key: str, *, timeout_s: float) -> bool:
        """Wait until nobody is attached; False when somebody still is after ``timeout_s``."""
        while self._open.get(key):
            closed = self._closed.setdefault(key, asyncio.Event())
            try:
                async with asyncio.timeout(timeout_s):
                    await closed.wait()
            except TimeoutError:
                return False
        return True

    def _leave(self, key: str) -> None:
        self._open[key] -= 1
        if not self._open[key]:
            del self._open[key]
            closed = self._closed.pop(key, None)
            if closed is not None:
                closed.set()
