"""Who is attached to which container, so that a clean-up can let them finish."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


class Sessions:
    """Counts the attached sessions of each container, and of each exec session."""

    def __init__(self) -> None:
        self._open: dict[str, int] = {}
        self._closed: dict[str, asyncio.Event] = {}

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
