"""An attached client's input, kept so that it can be sent again to a shim that was out of reach."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from services.common.errors import DataLoss
from services.daemon.containers.runtime import AttachInput, CloseInput, Input, Resize

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

_PIECE_BYTES = 64 << 10
_AHEAD_BYTES = 1 << 20
_KEPT_BYTES = 8 << 20


class InputFeed:
    """Takes a client's input in, and gives it out from any byte that is still kept.

    Args:
        source: what the client sends; it is not read further while much of it waits.
    """

    def __init__(self, source: AsyncIterator[AttachInput]) -> None:
        self._source = source
        self._kept = bytearray()
        self._first = 0  # offset of the first kept byte
        self._begun = False
        self._sent = 0
        self._closed = False
        self._size: Resize | None = None
        self._changed = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()

    async def take_in(self) -> None:
        """Read the client to its end."""
        async for piece in self._source:
            match piece:
                case Input():
                    await self._room.wait()
                    self._append(piece)
                case CloseInput():
                    self._closed = True
                case Resize():
                    self._size = piece
            self._changed.set()

    async def give_out(self, position: asyncio.Future[int]) -> AsyncGenerator[AttachInput, None]:
        """What to send to a shim that has taken ``position`` bytes, and what comes after that.

        Raises:
            DataLoss: that part is not kept any more, or the client began behind it.
        """
        offset = await position
        size: Resize | None = None
        closed = False
        while True:
            self._changed.clear()
            if self._size is not size:
                size = self._size
                if size is not None:
                    yield size
            elif piece := self._piece(offset):
                offset += len(piece)
                yield Input(offset - len(piece), piece)
            elif self._closed and not closed:
                closed = True
                yield CloseInput()
            else:
                await self._changed.wait()

    def _append(self, piece: Input) -> None:
        if not self._begun:
            self._begun, self._first = True, piece.offset
        end = self._first + len(self._kept)
        if piece.offset > end:
            raise DataLoss(f"input from byte {end} to {piece.offset} was left out")
        self._kept += piece.data[end - piece.offset :]
        if len(self._kept) - (self._sent - self._first) > _AHEAD_BYTES:
            self._room.clear()

    def _piece(self, offset: int) -> bytes:
        if not self._begun:
            return b""
        if offset < self._first:
            raise DataLoss(
                f"input cannot be resumed at byte {offset}: only what follows {self._first} is kept"
            )
        begin = offset - self._first
        data = bytes(self._kept[begin : begin + _PIECE_BYTES])
        self._sent = max(self._sent, offset + len(data))
        if len(self._kept) - (self._sent - self._first) <= _AHEAD_BYTES:
            self._room.set()
        surplus = min(self._sent - self._first, len(self._kept)) - _KEPT_BYTES
        if surplus > 0:
            del self._kept[:surplus]
            self._first += surplus
        return data
