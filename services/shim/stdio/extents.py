"""Which stream the bytes of a joint output belong to: needed to find them again in a log.

One number per change of stream. A process that changes at every line would grow the record without
bound, so the oldest changes are forgotten past a limit; their bytes are a gap to a reader that is
that far behind.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from typing import TYPE_CHECKING, Self

from services.common.frozen import frozen

if TYPE_CHECKING:
    from collections.abc import Iterable

EXTENTS_MAX = 32768


@frozen
class Extent:
    """A stretch of one stream in the joint output.

    Attributes:
        start: its joint offset.
        end: joint offset of its end; None for the last, which still grows.
        stream: stdout or stderr.
        stream_start: offset of its first byte in its stream.
    """

    start: int
    end: int | None
    stream: str
    stream_start: int


class Extents:
    """The record of one process."""

    def __init__(self) -> None:
        self._entries: deque[tuple[int, str, int]] = deque(maxlen=EXTENTS_MAX)

    def add(self, offset: int, stream: str, stream_offset: int) -> None:
        """Note that ``stream`` goes on at the joint ``offset``."""
        if not self._entries or self._entries[-1][1] != stream:
            self._entries.append((offset, stream, stream_offset))

    def find(self, offset: int) -> Extent | None:
        """The stretch that holds ``offset``; None if it was forgotten."""
        number = bisect_right(self._entries, offset, key=lambda entry: entry[0]) - 1
        if number < 0:
            return None
        start, stream, stream_start = self._entries[number]
        following = number + 1
        end = self._entries[following][0] if following < len(self._entries) else None
        return Extent(start, end, stream, stream_start)

    def pack(self) -> list[tuple[int, str, int]]:
        """The record as plain data, for :meth:`unpack`."""
        return list(self._entries)

    @classmethod
    def unpack(cls, entries: Iterable[tuple[int, str, int]]) -> Self:
        """The record of an earlier image of the shim."""
        extents = cls()
        extents._entries.extend((start, stream, at) for start, stream, at in entries)
        return extents

    def first_offset(self, default: int) -> int:
        """Joint offset of the oldest stretch that is known."""
        return self._entries[0][0] if self._entries else default
