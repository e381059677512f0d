"""Bodies of requests that can be sent again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable


@dataclass(frozen=True, slots=True)
class Body:
    """Some bytes to send.

    Attributes:
        read: gives them, from the beginning each time.
        size_bytes: how many there are.
    """

    read: Callable[[], AsyncIterator[bytes]]
    size_bytes: int

    def chunks(self) -> AsyncIterator[bytes]:
        """The bytes once more."""
        return self.read()


def bytes_body(data: bytes) -> Body:
    """A body that is in memory."""

    async def read() -> AsyncIterator[bytes]:
        yield data

    return Body(read, len(data))
