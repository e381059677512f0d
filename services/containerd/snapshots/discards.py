"""Removes the directories of removed snapshots behind the answers (``Background.start_behind``).

What waits is removed in one go. A directory that is still there when the process ends has no row
any more: the next cleanup takes it.
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
        self._background = Background()
        self._work: asyncio.Task[None] | None = None

    async def add(self, directory: Path) -> None:
        """Have a directory removed; waits for others where very many are to go."""
        self._waiting.append(directory)
        if not self._is_at_work():
            self._begin()
        if len(self._waiting) > _WAITING_MAX:
            await self.finish()

    async def finish(self) -> None:
        """Return once all that were added so far are gone."""
        while self._work is not None and self._is_at_work():
            self._background.hurry()
            await asyncio.wait([self._work])

    async def close(self) -> None:
        """Remove what waits, within a limit."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_S):
                await self.finish()
        await self._background.stop()

    def _is_at_work(self) -> bool:
        return self._work is not None and not self._work.done()

    def _begin(self) -> None:
        self._work = self._background.start_behind(self._run, name="removal of snapshots")

    async def _run(self) -> None:
        now, self._waiting = self._waiting, []
        await uninterrupted(asyncio.to_thread(self._throw_away_all, now))
        if self._waiting:  # they came meanwhile
            self._begin()

    def _throw_away_all(self, directories: list[Path]) -> None:
        for directory in directories:
            self._throw_away(directory)
