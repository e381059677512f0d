"""The lock on a tier's root directory: two processes never own one root.

A file ``lock`` below the root, locked with flock(2) for as long as its owner lives, holds its pid
for the message that a second one gives. The kernel lets go of it when the process ends, however.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from services.common.errors import FailedPrecondition

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


_PID_WIDTH = 20


class RootLock:
    """The lock of ``root``, which is created if need be."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._path = root / "lock"

    @asynccontextmanager
    async def held(self, timeout_s: float) -> AsyncIterator[None]:
        """Hold the lock inside the block; wait for an owner that is leaving, at most ``timeout_s``.

        Raises:
            FailedPrecondition: another process still owns the root; its pid is in the message.
        """
        self._root.mkdir(parents=True, exist_ok=True, mode=0o711)
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            await self._acquire(fd, timeout_s)
            # In place, and always as long: on a full disk there is no room for a new block.
            os.pwrite(fd, f"{os.getpid():<{_PID_WIDTH}}\n".encode(), 0)
            os.ftruncate(fd, _PID_WIDTH + 1)
            yield
        finally:
            os.close(fd)

    async def _acquire(self, fd: int, timeout_s: float) -> None:
        # flock has no time limit of its own, and no descriptor to wait on: ask, with a pause.
        give_up_at = asyncio.get_running_loop().time() + timeout_s
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if asyncio.get_running_loop().time() >= give_up_at:
                    raise FailedPrecondition(
                        f"root {self._root} belongs to process {self._holder()}: stop that one, or "
                        f"choose another --root"
                    ) from None
            await asyncio.sleep(0.02)

    def _holder(self) -> str:
        return self._path.read_text().strip() or "(unknown)"
