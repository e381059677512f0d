"""Removes the directories of removed snapshots behind the answers, a little later.

Whoever removes a snapshot mostly has another call to make at once, which the removal of files would
keep from the processor and the disk. What waits is removed in one go. A directory that is still
there when the process ends has no row any more: the next cleanup takes it.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING

from services.common.background import Background
from services.containerd.uninterrupted import uninterrupted

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_LATER_S = 0.02
_WAITING_MAX = 256
_CLOSE_S = 2.0


class Discards:
    """The directories that are to go.

    Args:
        throw_away: removes one. Blocks; what it cannot remove it logs.
    """

    def __init__(self, throw_away: Callable[[Path], None]) -> None:
        self._throw_away = throw_away
        self._waiting: list[Path] = []
        self._hurry = asyncio.Event()
        self._work: asyncio.Task[None] | None = None
        self._background = Background()

    async def add(self, directory: Path) -> None:
        """Have a directory removed; waits for others where very many are to go."""
        self._waiting.append(directory)
        if self._work is None:
            self._work = self._background.start(self._run(), name="removal of snapshots")
        if len(self._waiting) > _WAITING_MAX:
            await self.finish()

    async def finish(self) -> None:
        """Return once all that were added so far are gone."""
        while self._work is not None:
            self._hurry.set()
            await asyncio.wait([self._work])

    async def close(self) -> None:
        """Remove what waits, within a limit."""
        self._hurry.set()
        await self._background.finish(_CLOSE_S)
        await self._background.stop()

    async def _run(self) -> None:
        try:
            while self._waiting:
                with suppress(TimeoutError):
                    async with asyncio.timeout(_LATER_S):
                        await self._hurry.wait()
                now, self._waiting = self._waiting, []
                await uninterrupted(asyncio.to_thread(self._throw_away_all, now))
        finally:
            self._hurry.clear()
            self._work = None

    def _throw_away_all(self, directories: list[Path]) -> None:
        for directory in directories:
            self._throw_away(directory)
