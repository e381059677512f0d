"""When garbage is collected: soon after something was deleted, at times, and when asked for."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

import structlog

if TYPE_CHECKING:
    from collections.abc import Callable

    from services.containerd.gc.collector import Collection

log = structlog.get_logger(__name__)

PAUSE_SHARE = 0.02
"""Share of the time that scheduled collections may take at most."""


class Collecting(Protocol):
    """What the schedule drives."""

    async def collect(self) -> Collection:
        """Remove everything that nothing refers to now."""


class GcSchedule:
    """Runs collections. ``run`` is its background task.

    Args:
        collector: does the work.
        delay_s: time between a deletion and its collection, so that one does for many.
        interval_s: time after which one runs in any case: leases expire by themselves.
        observe: told about each collection, for metrics.
        retry_s: time from a collection that failed to the next one.
    """

    def __init__(
        self,
        collector: Collecting,
        *,
        delay_s: float,
        interval_s: float,
        observe: Callable[[Collection], None],
        retry_s: float = 1.0,
    ) -> None:
        self._collector = collector
        self._delay_s = delay_s
        self._interval_s = interval_s
        self._observe = observe
        self._retry_s = retry_s
        self._wanted = asyncio.Event()

    def request(self) -> None:
        """Have a collection run soon: something may have become garbage."""
        self._wanted.set()

    async def collect(self) -> Collection:
        """Run a collection now; returns when it has ended.

        Raises:
            Exception: the disk's or the database's fault; another collection will be tried.
        """
        self._wanted.clear()
        collection = await self._collector.collect()
        self._observe(collection)
        return collection

    async def run(self) -> None:
        """Collect as scheduled, until cancelled. A collection that fails is tried again later."""
        pause_s = self._delay_s
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._interval_s):
                    await self._wanted.wait()
            await asyncio.sleep(pause_s)
            try:
                collection = await self.collect()
            except Exception:
                log.exception("collection failed")
                self._wanted.set()
                pause_s = self._retry_s
            else:
                pause_s = max(self._delay_s, collection.seconds / PAUSE_SHARE)
