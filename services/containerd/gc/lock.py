"""The lock between those who make things and the collector: many of them, or the one.

Rows need no lock, since the collector marks and sweeps in one transaction. Files do: a blob's file
is put in place before its row, and removed after its row. Whoever does such a pair of steps holds
the lock ``shared`` around both, briefly: long work is protected by a lease, not by this lock.

Order: this lock first, then locks of single objects. It is not re-entrant; a collector that waits
keeps newcomers waiting, so that it gets its turn.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


class GcLock:
    """Shared by workers, exclusive to the collector."""

    def __init__(self) -> None:
        self._changed = asyncio.Condition()
        self._shared = 0  # guarded by _changed
        self._waiting = 0  # guarded by _changed
        self._exclusive = False  # guarded by _changed

    @asynccontextmanager
    async def shared(self) -> AsyncIterator[None]:
        """Hold the lock together with other workers."""
        async with self._changed:
            await self._changed.wait_for(lambda: not self._exclusive and not self._waiting)
            self._shared += 1
        try:
            yield
        finally:
            await asyncio.shield(self._release_shared())

    @asynccontextmanager
    async def exclusive(self) -> AsyncIterator[None]:
        """Hold the lock alone."""
        async with self._changed:
            self._waiting += 1
            try:
                await self._changed.wait_for(lambda: not self._exclusive and not self._shared)
                self._exclusive = True
            finally:
                self._waiting -= 1
                self._changed.notify_all()
        try:
            yield
        finally:
            await asyncio.shield(self._release_exclusive())

    async def _release_shared(self) -> None:
        async with self._changed:
            self._shared -= 1
            self._changed.notify_all()

    async def _release_exclusive(self) -> None:
        async with self._changed:
            self._exclusive = False
            self._changed.notify_all()
