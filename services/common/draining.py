"""What a stop does to calls that may take for ever: they end with UNAVAILABLE, to be asked again.

Other calls get the time to finish that the server gives them.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from services.common.errors import Unavailable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

_RETRY_AFTER_S = 0.1


class Draining:
    """Knows the endless calls that are under way at ``tier``."""

    def __init__(self, tier: str) -> None:
        self._tier = tier
        self._draining = False
        self._calls: set[asyncio.Timeout] = set()

    def drain(self) -> None:
        """End the endless calls that are under way, and those that still come."""
        self._draining = True
        now_s = asyncio.get_running_loop().time()
        for call in self._calls:
            if not call.expired():
                call.reschedule(now_s)

    @asynccontextmanager
    async def endless(self) -> AsyncIterator[None]:
        """Mark the block as one that may take for ever.

        Raises:
            Unavailable: the tier is stopping.
        """
        stopping = Unavailable(
            f"{self._tier} is stopping: ask again when it is back", retry_after_s=_RETRY_AFTER_S
        )
        if self._draining:
            raise stopping
        try:
            # A timeout that has no limit until there is a reason.
            async with asyncio.timeout(None) as call:
                self._calls.add(call)
                try:
                    yield
                finally:
                    self._calls.discard(call)
        except TimeoutError:
            if call.expired():
                raise stopping from None
            raise
