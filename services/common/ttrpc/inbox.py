"""What has come on a stream and was not taken yet; a peer that is ahead too far has to wait."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from services.common.ttrpc.connection import FrameConnection

_MOST_BYTES = 1 << 20


class Inbox:
    """The messages of one stream, to one reader.

    Args:
        connection: it reads no more while there is too much. That holds up its other calls too: a
            client of ours gives each stream a connection of its own.
    """

    def __init__(self, connection: FrameConnection) -> None:
        self._connection = connection
        self._messages: deque[bytes] = deque()
        self._bytes = 0
        self._paused = False
        self._news = asyncio.Event()
        self._ended = False

    def put(self, message: bytes) -> None:
        """Take a message in."""
        self._messages.append(message)
        self._bytes += len(message)
        self._news.set()
        if self._bytes > _MOST_BYTES and not self._paused:
            self._paused = True
            self._connection.pause_reading()

    def end(self) -> None:
        """No more will come. Idempotent."""
        self._ended = True
        self._news.set()

    async def get(self) -> bytes | None:
        """The next message; None at the end."""
        while not self._messages:
            if self._ended:
                return None
            self._news.clear()
            await self._news.wait()
        message = self._messages.popleft()
        self._bytes -= len(message)
        if self._paused and self._bytes <= _MOST_BYTES // 2:
            self._paused = False
            self._connection.resume_reading()
        return message
