"""Waits for a file to appear, by inotify(7), even if its directory does not exist yet.

The nearest directory that exists is watched; whatever happens there is a reason to look again.
"""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Self

import structlog

from services.common import linux

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

log = structlog.get_logger(__name__)

_MASK = linux.IN_CREATE | linux.IN_MOVED_TO | linux.IN_DELETE_SELF | linux.IN_MOVE_SELF


class Appearance:
    """A context manager that watches for ``path``."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = -1
        self._seen = asyncio.Event()
        self._watches: dict[int, str] = {}

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def watching(self) -> bool:
        """Whether there is a watch."""
        return self._fd >= 0

    def open(self) -> None:
        """Watch from now on. Idempotent."""
        if self._fd >= 0:
            return
        try:
            self._fd = linux.inotify_init()
        except OSError as error:  # the user's limit of instances: the pause has to do
            log.warning("cannot watch for containerd's socket", error=error.strerror)
            return
        asyncio.get_running_loop().add_reader(self._fd, self._changed)
        self._arm()

    def close(self) -> None:
        """Watch no more. Idempotent; takes some 10 ms, as the kernel waits for its readers."""
        if self._fd >= 0:
            asyncio.get_running_loop().remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1
            self._watches.clear()

    async def wait(self, limit_s: float) -> bool:
        """Wait until something may have appeared since the last time, at most ``limit_s``.

        Returns:
            False if time is up.
        """
        try:
            async with asyncio.timeout(limit_s):
                await self._seen.wait()
        except TimeoutError:
            pass
        seen = self._seen.is_set()
        self._seen.clear()
        return seen

    def _changed(self) -> None:
        for event in linux.inotify_read(self._fd):
            expected = self._watches.get(event.watch)
            if event.mask & (linux.IN_CREATE | linux.IN_MOVED_TO):
                if event.name == expected:
                    self._seen.set()
            else:
                self._watches.pop(event.watch, None)
        self._arm()

    def _arm(self) -> None:
        """Watch the directory, or the nearest one above it, for the next name on the way."""
        name, directory = self._path.name, self._path.parent
        while True:
            try:
                watch = linux.inotify_add_watch(self._fd, directory, _MASK)
            except OSError:
                if directory == directory.parent:
                    return
                name, directory = directory.name, directory.parent
                continue
            self._watches[watch] = name
            return
