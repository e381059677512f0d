"""One side of a ttrpc connection: frames in by a callback, frames out by a method."""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import TYPE_CHECKING, cast

from services.common.ttrpc.frames import Frame, FrameBuffer, MessageTooLarge

if TYPE_CHECKING:
    from collections.abc import Callable

_READ_BYTES = 65536


class FrameConnection(asyncio.Protocol):
    """The protocol of a Unix socket that carries frames.

    Args:
        received: called with each frame, in order.
        refused: called for a message that was too large, and is skipped.
        lost: called once, when the connection is of no more use.
    """

    def __init__(
        self,
        *,
        received: Callable[[Frame], None],
        refused: Callable[[MessageTooLarge], None],
        lost: Callable[[], None],
    ) -> None:
        self._received = received
        self._refused = refused
        self._lost = lost
        self._buffer = FrameBuffer()
        self._transport: asyncio.Transport | None = None
        self._room = asyncio.Event()
        self._room.set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """As asyncio's."""
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """As asyncio's."""
        for found in self._buffer.feed(data):
            if isinstance(found, Frame):
                self._received(found)
            else:
                self._refused(found)
        if self._buffer.alien:
            self.abort()

    @property
    def alien(self) -> bool:
        """Whether the peer speaks something else."""
        return self._buffer.alien

    def connection_lost(self, error: Exception | None) -> None:
        """As asyncio's; what the peer said before it hung up is heard, even if a write failed."""
        if isinstance(error, ConnectionError):
            self._read_rest()
        self._room.set()
        self._lost()

    def _read_rest(self) -> None:
        """Take in what has arrived: a loop whose write fails reads no more.

        It may be a last answer, or the first bytes of a peer that speaks something else and hung up
        between two of our frames. No more comes after it, so what there is to read is bounded.
        """
        assert self._transport is not None
        fd = self._transport.get_extra_info("socket").fileno()
        with contextlib.suppress(OSError):
            while data := os.read(fd, _READ_BYTES):
                self.data_received(data)

    def pause_writing(self) -> None:
        """As asyncio's."""
        self._room.clear()

    def resume_writing(self) -> None:
        """As asyncio's."""
        self._room.set()

    def send(self, packed: bytes) -> None:
        """Put a packed frame on its way; on a lost connection nothing happens."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(packed)

    async def drain(self) -> None:
        """Wait while too much is on its way; a lost connection has room."""
        if not self._room.is_set():
            await self._room.wait()

    def pause_reading(self) -> None:
        """Take no more in for now: the peer has to wait."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        """Go on after :meth:`pause_reading`."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def close(self) -> None:
        """Hang up once what is on its way has gone. Idempotent."""
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """Hang up at once. Idempotent."""
        if self._transport is not None:
            self._transport.abort()
