"""Bodies of requests that can be sent again."""

from __future__ import annotations

from contextlib import aclosing
from typing import TYPE_CHECKING

from services.common.frozen import frozen

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable


@frozen
class Body:
    """Some bytes to send.

    Attributes:
        read: gives the bytes from an offset on, to their end.
        size_bytes: how many to send.
        offset: of the first one.
    """

    read: Callable[[int], AsyncGenerator[bytes, None]]
    size_bytes: int
    offset: int = 0

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """The bytes once more."""
        left = self.size_bytes
        async with aclosing(self.read(self.offset)) as pieces:
            async for piece in pieces:
                if left <= len(piece):
                    yield piece[:left]
                    return
                yield piece
                left -= len(piece)

    def part(self, offset: int, size_bytes: int) -> Body:
        """Some of it."""
        return Body(self.read, min(size_bytes, self.size_bytes - offset), self.offset + offset)


def bytes_body(data: bytes) -> Body:
    """A body that is in memory."""

    async def read(offset: int) -> AsyncGenerator[bytes, None]:
        yield data[offset:]

    return Body(read, len(data))
