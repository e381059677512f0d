"""Begins to write a layer to the disk while it is still being unpacked.

A layer is durable before it is committed, and that commit waits for the disk. If the kernel has
begun by then, it waits for the rest only. What is durable when stays the committer's business; but
the kernel tells a failed write once (errseq in syncfs(2)), so one that is told here is raised here.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from services.common import linux

if TYPE_CHECKING:
    from collections.abc import Callable

_STEP_BYTES = 16 << 20


class Flusher:
    """Starts a syncfs(2) in a thread of its own after every ``_STEP_BYTES``, one at a time.

    Args:
        fd: of something in the file system; not closed before ``finish``.
        sync: what to call with it.
    """

    def __init__(self, fd: int, sync: Callable[[int], None] = linux.syncfs) -> None:
        self._fd = fd
        self._sync = sync
        self._waiting = 0
        self._thread: threading.Thread | None = None
        self._error: OSError | None = None

    def wrote(self, size_bytes: int) -> None:
        """Note that so much was written."""
        self._waiting += size_bytes
        if self._waiting < _STEP_BYTES or (self._thread is not None and self._thread.is_alive()):
            return
        self._waiting = 0
        self._thread = threading.Thread(target=self._flush, name="layer-flush")
        self._thread.start()

    def finish(self) -> OSError | None:
        """Wait until the file system is not used any more; returns what went wrong. Idempotent."""
        if self._thread is not None:
            self._thread.join()
        return self._error

    def _flush(self) -> None:
        try:
            self._sync(self._fd)
        except OSError as error:
            self._error = self._error or error
