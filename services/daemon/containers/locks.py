"""One operation at a time on one container.

Create, start, clean-up and removal of a container exclude one another for as long as they take,
calls to containerd included: what they do together makes sense only whole. Each of those calls has
a deadline. Nothing that containerd's events lead to takes these locks, and neither do stop, kill,
exec, attach and wait, so an operation that hangs holds up nothing but others of its kind.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


class OperationLocks:
    """Mutual exclusion per container id, in order of arrival."""

    def __init__(self) -> None:
        self._locks: dict[str, tuple[asyncio.Lock, int]] = {}

    @asynccontextmanager
    async def hold(self, container_id: str) -> AsyncIterator[None]:
        """Hold the lock of a container inside the block."""
        lock, users = self._locks.get(container_id, (asyncio.Lock(), 0))
        self._locks[container_id] = (lock, users + 1)
        try:
            async with lock:
                yield
        finally:
            lock, users = self._locks.pop(container_id)
            if users > 1:
                self._locks[container_id] = (lock, users - 1)
