"""Standard input as one sequence of bytes from which any part not yet taken can be sent again.

A thread reads, since a terminal, a pipe and a file are waited for in different ways, and ends with
the process. It stops reading while much is waiting to be sent, and what was sent is kept, up to a
bound, until nobody can ask for it any more.
"""

from __future__ import annotations

import asyncio
import os
import threading
from typing import TYPE_CHECKING

from services.common.errors import DataLoss

if TYPE_CHECKING:
    from collections.abc import Callable

_PIECE_BYTES = 32 * 1024
_AHEAD_BYTES = 1 << 20
_KEPT_BYTES = 16 << 20


class Input:
    """The input of an attached process. Used from one event loop.

    Args:
        changed: called when there is more to send.
    """

    def __init__(self, changed: Callable[[], None]) -> None:
        self.ended = False
        self._changed = changed
        self._kept = bytearray()
        self._first = 0  # offset of the first kept byte
        self._sent = 0
        self._room = threading.Event()
        self._room.set()

    @property
    def end(self) -> int:
        """Offset behind the last byte read."""
        return self._first + len(self._kept)

    def feed(self, data: bytes) -> None:
        """Append what was read; nothing means the end."""
        if data:
            self._kept += data
            if self.end - self._sent > _AHEAD_BYTES:
                self._room.clear()
        else:
            self.ended = True
        self._changed()

    def begin(self, offset: int) -> None:
        """Nothing was read yet; its first byte will be the process' byte ``offset``."""
        self._first = self._sent = offset

    def check(self, offset: int) -> None:
        """Make sure that input can go on at ``offset``.

        Raises:
            DataLoss: that part was thrown away, or was never read.
        """
        if not self._first <= offset <= self.end:
            raise DataLoss(
                f"input cannot be resumed at byte {offset}: "
                f"bytes {self._first} to {self.end} are known here"
            )

    def piece(self, offset: int) -> bytes:
        """What follows ``offset``, at most one message's worth; empty when nothing is there."""
        begin = offset - self._first
        data = bytes(self._kept[begin : begin + _PIECE_BYTES])
        self._sent = max(self._sent, offset + len(data))
        self._forget()
        return data

    def read_from(self, fd: int, transform: Callable[[bytes], bytes] = bytes) -> None:
        """Start the thread that reads ``fd`` to its end; ``transform`` runs in the event loop."""
        loop = asyncio.get_running_loop()
        delivered = threading.Event()

        def deliver(data: bytes) -> None:
            if not data:
                self.feed(b"")
            elif data := transform(data):
                self.feed(data)
            delivered.set()

        def read() -> None:
            data = b"-"
            delivered.set()
            while data:
                # Only what was delivered counts against the room there is.
                delivered.wait()
                delivered.clear()
                self._room.wait()
                try:
                    data = os.read(fd, _PIECE_BYTES)
                except OSError:  # a terminal that hung up
                    data = b""
                try:
                    loop.call_soon_threadsafe(deliver, data)
                except RuntimeError:  # the loop is closed: nobody wants it any more
                    return

        threading.Thread(target=read, name="stdin", daemon=True).start()

    def _forget(self) -> None:
        if self.end - self._sent <= _AHEAD_BYTES:
            self._room.set()
        surplus = min(self._sent - self._first, len(self._kept)) - _KEPT_BYTES
        if surplus > 0:
            del self._kept[:surplus]
            self._first += surplus
