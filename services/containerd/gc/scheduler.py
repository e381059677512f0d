"""Runs collections when they are due. What makes them due is :mod:`.timetable`'s to say."""

from __future__ import annotations

import asyncio
import math
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

import structlog

from services.common.errors import Unavailable
from services.containerd.gc.timetable import Timetable

if TYPE_CHECKING:
    from collections.abc import Callable

    from services.containerd.gc.collector import Collection
    from services.containerd.gc.policy import GcPolicy

log = structlog.get_logger(__name__)


class Collecting(Protocol):
    """What the schedule drives."""

    async def collect(self) -> Collection:
        """Remove everything that nothing refers to now."""


class GcSchedule:
    """The schedule of a node. ``run`` is its background task; stores tell it of their changes.

    Nothing of it is recorded. A process that dies with a collection outstanding is followed by one
    that makes its first collection ``startup_delay_s`` after its start.

    Args:
        policy: how often.
        observe: told about each collection, None for one that failed; for metrics.
        clock: monotonic, in seconds.
    """

    def __init__(
        self,
        policy: GcPolicy,
        *,
        observe: Callable[[Collection | None], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._observe = observe
        self._timetable = Timetable(policy)
        self._sooner = asyncio.Event()
        self._waiting: list[asyncio.Future[Collection]] = []
        self._stopped = False

    def changed(self) -> None:
        """See :class:`Mutations`."""
        self._note(self._timetable.changed)

    def deleted(self) -> None:
        """See :class:`Mutations`."""
        self._note(self._timetable.deleted)

    async def collect(self) -> Collection:
        """Have a collection run now; returns when one that began after the call has ended.

        Raises:
            Exception: the disk's or the database's fault; another collection will be tried.
            Unavailable: containerd stops.
        """
        if self._stopped:
            raise _stops()
        ended: asyncio.Future[Collection] = asyncio.get_running_loop().create_future()
        self._waiting.append(ended)
        self._note(self._timetable.asked)
        return await ended

    async def run(self, collector: Collecting) -> None:
        """Collect as scheduled, until cancelled. A collection that fails is tried again later."""
        self._timetable.begin(self._clock())
        try:
            while True:
                await self._until_due()
                await self._collect(collector)
        finally:
            self._stopped = True
            for ended in self._waiting:
                if not ended.done():
                    ended.set_exception(_stops())

    async def _until_due(self) -> None:
        while (wait_s := self._timetable.due_s - self._clock()) > 0:
            self._sooner.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(wait_s if wait_s < math.inf else None):
                    await self._sooner.wait()

    async def _collect(self, collector: Collecting) -> None:
        self._timetable.began()
        # Kept in ``_waiting`` until then: a stop in the meantime is told to all of them.
        count = len(self._waiting)
        failure: Exception | None = None
        try:
            collection = await collector.collect()
        except Exception as error:
            log.exception("collection failed")
            failure = error
            self._observe(None)
            self._timetable.failed(self._clock())
        else:
            self._observe(collection)
            self._timetable.ended(self._clock(), pause_s=collection.pause_s)
        served, self._waiting = self._waiting[:count], self._waiting[count:]
        for ended in served:
            if ended.done():  # its caller has gone away
                continue
            if failure is not None:
                ended.set_exception(failure)
            else:
                ended.set_result(collection)

    def _note(self, event: Callable[[float], None]) -> None:
        before = self._timetable.due_s
        event(self._clock())
        if self._timetable.due_s < before:
            self._sooner.set()


def _stops() -> Unavailable:
    return Unavailable("garbage is not collected any more: containerd stops")
