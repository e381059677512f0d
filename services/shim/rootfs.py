"""The root file system of a container, as far as it is for the shim to mount.

To unmount an overlay takes two milliseconds, since the kernel ends it by a sync of the disk below.
It is taken out of the tree of mounts at once, and ends after that: what follows goes on beside it.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

import structlog

from services.common import linux, mounts
from services.common.errors import TheseusError
from services.common.frozen import plain

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from services.common.mounts import Mount

log = structlog.get_logger(__name__)


class RootFs:
    """What is to be mounted at ``path``; nothing where the bundle has its files already."""

    def __init__(self, path: Path, mounted: Sequence[Mount]) -> None:
        self._path = path
        self._mounts = tuple(mounted)
        self._ending: asyncio.Future[None] | None = None

    def state(self) -> list[object]:
        """The mounts as plain data."""
        return [plain(mount) for mount in self._mounts]

    def mount(self, *, alone: bool) -> asyncio.Future[None]:
        """Mount it, or begin to.

        Args:
            alone: there is no other container that a disk which hangs would hold up. A thread is
                spared then, which takes as long to get and to ask as the kernel does to mount.

        Raises:
            FailedPrecondition: by the future: the kernel refuses.
        """
        loop = asyncio.get_running_loop()
        if not alone:
            return loop.run_in_executor(None, self._mount)
        done: asyncio.Future[None] = loop.create_future()
        try:
            self._mount()
        except (TheseusError, OSError) as error:
            done.set_exception(error)
        else:
            done.set_result(None)
        return done

    async def unmount(self) -> None:
        """Unmount it. Idempotent. Where it was there is nothing after that; see ``ended``."""
        if not self._mounts:
            return
        loop = asyncio.get_running_loop()
        gone: asyncio.Future[None] = loop.create_future()
        say = partial(loop.call_soon_threadsafe, gone.set_result, None)
        ending = self._ending = loop.run_in_executor(None, self._unmount, say)
        await asyncio.wait([gone, ending], return_when=asyncio.FIRST_COMPLETED)
        if ending.done():
            ending.result()

    async def ended(self) -> None:
        """Wait until the kernel has ended what was unmounted: what was written is on the disk."""
        if self._ending is not None:
            await asyncio.wait([self._ending])

    async def take_down(self, mounted: asyncio.Future[None]) -> None:
        """Undo what ``mount`` began; a failure is logged, lest it hide the one that it follows."""
        await asyncio.wait([mounted])
        if mounted.exception() is not None:  # there is nothing mounted
            return
        try:
            await self.unmount()
            await self.ended()
        except (TheseusError, OSError) as error:
            log.error("root file system stays mounted", path=str(self._path), error=str(error))

    def _unmount(self, gone: Callable[[], object]) -> None:
        copy = -1
        try:
            # While there is a copy of the mount the kernel only takes it out of the tree. Without
            # one it ends it there and then.
            with suppress(OSError):
                copy = linux.clone_tree(self._path)
            mounts.unmount(self._path)
            gone()
        finally:
            if copy >= 0:
                os.close(copy)

    def _mount(self) -> None:
        if self._mounts:
            self._path.mkdir(mode=0o711, exist_ok=True)
            mounts.mount_all(self._mounts, self._path)
