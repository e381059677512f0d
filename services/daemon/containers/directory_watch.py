"""Learning that something in a directory has changed: one inotify(7) instance for all readers.

Instances are few: by default 128 for all processes of a user. Where the kernel has none left, or no
watch, readers look from time to time instead, and the log says so once.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

import structlog

from services.common import linux

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

log = structlog.get_logger(__name__)

_MASK = linux.IN_MODIFY | linux.IN_CREATE | linux.IN_MOVED_TO | linux.IN_MOVED_FROM
_LOOK_AGAIN_S = 0.5


class DirectoryWatch:
    """Watches directories for as long as somebody wants to know. The owner closes it."""

    def __init__(self) -> None:
        self._fd = -1
        self._watchers: dict[int, set[asyncio.Event]] = {}
        self._refused = False

    @contextmanager
    def watching(self, directory: Path, changed: asyncio.Event) -> Iterator[None]:
        """Set ``changed`` whenever something in ``directory`` changes, while the block lasts.

        A directory that does not exist never changes.
        """
        try:
            watch = self._add(directory, changed)
        except FileNotFoundError:
            yield
            return
        except OSError as error:
            self._note_refusal(error)
            with _ticking(changed):
                yield
            return
        try:
            yield
        finally:
            self._remove(watch, changed)

    def close(self) -> None:
        """Let go of the instance."""
        if self._fd >= 0:
            asyncio.get_running_loop().remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1

    def _add(self, directory: Path, changed: asyncio.Event) -> int:
        if self._fd < 0:
            self._fd = linux.inotify_init()
            asyncio.get_running_loop().add_reader(self._fd, self._read)
        # The kernel gives the same number to one directory that is watched twice.
        watch = linux.inotify_add_watch(self._fd, directory, _MASK)
        self._watchers.setdefault(watch, set()).add(changed)
        return watch

    def _remove(self, watch: int, changed: asyncio.Event) -> None:
        watchers = self._watchers.get(watch, set())
        watchers.discard(changed)
        if not watchers:
            self._watchers.pop(watch, None)
            if self._fd >= 0:
                linux.inotify_remove_watch(self._fd, watch)

    def _read(self) -> None:
        for event in linux.inotify_read(self._fd):
            # An overflow of the queue has no watch: everybody looks.
            watchers = (
                self._watchers.get(event.watch, ())
                if event.watch >= 0
                else [one for every in self._watchers.values() for one in every]
            )
            for changed in watchers:
                changed.set()

    def _note_refusal(self, error: OSError) -> None:
        if not self._refused:
            self._refused = True
            log.warning(
                "inotify is used up, looking from time to time",
                reason=error.strerror,
                remedy="raise fs.inotify.max_user_instances or max_user_watches",
            )


@contextmanager
def _ticking(changed: asyncio.Event) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    pending: list[asyncio.TimerHandle] = []

    def tick() -> None:
        changed.set()
        pending[:] = [loop.call_later(_LOOK_AGAIN_S, tick)]

    pending.append(loop.call_later(_LOOK_AGAIN_S, tick))
    try:
        yield
    finally:
        pending[0].cancel()
