"""The root file system of a container, as far as it is for the shim to mount."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import structlog

from services.common import mounts
from services.common.errors import TheseusError
from services.shim.bundle import plain

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from services.common.mounts import Mount

log = structlog.get_logger(__name__)


class RootFs:
    """What is to be mounted at ``path``; nothing where the bundle has its files already."""

    def __init__(self, path: Path, mounted: Sequence[Mount]) -> None:
        self._path = path
        self._mounts = tuple(mounted)

    def state(self) -> list[object]:
        """The mounts as plain data."""
        return [plain(mount) for mount in self._mounts]

    def mount(self) -> asyncio.Future[None]:
        """Begin to mount it in a thread.

        Raises:
            FailedPrecondition: by the future: the kernel refuses.
        """
        return asyncio.get_running_loop().run_in_executor(None, self._mount)

    async def unmount(self) -> None:
        """Unmount it. Idempotent."""
        if self._mounts:
            await asyncio.to_thread(mounts.unmount, self._path)

    async def take_down(self, mounted: asyncio.Future[None]) -> None:
        """Undo what ``mount`` began; a failure is logged, lest it hide the one that it follows."""
        await asyncio.wait([mounted])
        if mounted.exception() is not None:  # there is nothing mounted
            return
        try:
            await self.unmount()
        except (TheseusError, OSError) as error:
            log.error("root file system stays mounted", path=str(self._path), error=str(error))

    def _mount(self) -> None:
        if self._mounts:
            self._path.mkdir(mode=0o711, exist_ok=True)
            mounts.mount_all(self._mounts, self._path)
