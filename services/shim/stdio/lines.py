"""Output cut into lines, in bulk: never line by line, and never inside a character.

A line longer than 16 KiB is cut into pieces, as docker and Kubernetes' runtimes do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.common.frozen import frozen

if TYPE_CHECKING:
    from collections.abc import Iterator

LINE_MAX_BYTES = 16384


@frozen
class Run:
    """A run of raw output that becomes log lines.

    Attributes:
        raw: whole lines, or one piece of a long or unfinished line.
        whole: whether every newline in ``raw`` ends one log line.
    """

    raw: bytes
    whole: bool


class LineSplitter:
    """Cuts one stream into runs; keeps an unfinished line until it is finished or too long."""

    def __init__(self) -> None:
        self._rest = b""

    @property
    def pending_bytes(self) -> int:
        """Length of the unfinished line."""
        return len(self._rest)

    @property
    def rest(self) -> bytes:
        """The unfinished line; may be set, to go on where another splitter was."""
        return self._rest

    @rest.setter
    def rest(self, rest: bytes) -> None:
        self._rest = rest

    def feed(self, data: bytes) -> Iterator[Run]:
        """Add output; gives the runs that are complete."""
        if self._rest:
            data = self._rest + data
        begin = position = 0
        size = len(data)
        while size - position >= LINE_MAX_BYTES:
            # The last newline within reach of one line: all lines before it are short enough.
            newline = data.rfind(b"\n", position, position + LINE_MAX_BYTES)
            if newline >= 0:
                position = newline + 1
                continue
            if position > begin:
                yield Run(data[begin:position], whole=True)
            begin = position
            position += _cut(data, position)
            yield Run(data[begin:position], whole=False)
            begin = position
        newline = data.rfind(b"\n", position)
        if newline >= 0:
            position = newline + 1
        if position > begin:
            yield Run(data[begin:position], whole=True)
        self._rest = data[position:]

    def finish(self) -> Iterator[Run]:
        """End the stream; gives what is left of its last line."""
        if self._rest:
            yield Run(self._rest, whole=False)
            self._rest = b""


@frozen
class Formatted:
    """Log lines.

    Attributes:
        pieces: the lines, to be written one piece after the other: joining them would cost a copy.
        lossy: whether the raw bytes cannot be had back from them.
        newlines: how many there were.
    """

    pieces: tuple[bytes | memoryview, ...]
    lossy: bool
    newlines: int = 0

    @property
    def data(self) -> bytes:
        """The pieces as one."""
        return b"".join(self.pieces)


def nth_newline_end(data: bytes, count: int) -> int:
    """Offset behind the ``count``-th newline of ``data``, which has that many."""
    low, high, before = 0, len(data), 0
    while high - low > 1:
        middle = (low + high) // 2
        within = data.count(b"\n", low, middle)
        if before + within >= count:
            high = middle
        else:
            low, before = middle, before + within
    return high


def _cut(data: bytes, position: int) -> int:
    """Length of the piece that begins a long line: 16 KiB, or less not to split a character."""
    end = position + LINE_MAX_BYTES
    for back in range(1, 4):
        byte = data[end - back]
        if byte & 0xC0 == 0xC0:  # the first byte of a character
            length = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return LINE_MAX_BYTES - back if length > back else LINE_MAX_BYTES
        if byte & 0x80 == 0:
            break
    return LINE_MAX_BYTES
