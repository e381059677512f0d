"""The formats of log files: docker's json-file, Kubernetes' CRI, and the bytes as they came."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Protocol

from services.common.frozen import frozen
from services.shim.stdio import cri, json_file
from services.shim.stdio.lines import LineSplitter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from services.shim.stdio.lines import Formatted, Run


@frozen
class Chunk:
    """Formatted output that must not be torn apart except between lines.

    Attributes:
        raw: what it stands for.
        pieces: what to write, one after the other.
        lossy: see Place.
        lines: whether every newline of ``raw`` ends one line of the pieces.
        newlines: how many there are in ``raw``.
    """

    raw: bytes
    pieces: tuple[bytes | memoryview, ...]
    lossy: bool
    lines: bool
    newlines: int = 0

    @property
    def size_bytes(self) -> int:
        """Length of what to write."""
        return sum(map(len, self.pieces))

    @property
    def data(self) -> bytes:
        """The pieces as one."""
        return b"".join(self.pieces)


class Format(Protocol):
    """Turns one process' output into what is written.

    Attributes:
        lines: whether a file of it consists of whole lines.
    """

    lines: bool

    def feed(self, stream: str, data: bytes, time_ns: int) -> Iterator[Chunk]:
        """Chunks that are complete after ``data``."""
        ...

    def finish(self, stream: str, time_ns: int) -> Iterator[Chunk]:
        """What was left of a stream."""
        ...

    def parse(self, line: bytes) -> tuple[str, bytes] | None:
        """Stream and raw bytes of a line that was written; None when it is not one."""
        ...

    def unfinished(self) -> dict[str, bytes]:
        """By stream, what was fed and not given back yet: an unfinished line."""
        ...

    def resume(self, unfinished: Mapping[str, bytes]) -> None:
        """Go on where another object, which ``unfinished`` is from, was."""
        ...


class Style(Protocol):
    """How lines of output look in a format of log lines: a module."""

    def look(self, data: bytes) -> frozenset[bytes]:
        """What in ``data`` has to be escaped; to be looked for in much data at once."""
        ...

    def format_run(
        self, run: Run, stream: str, timestamp: str, found: frozenset[bytes]
    ) -> Formatted:
        """The log lines of a run, which is a part of data in which ``found`` was found."""
        ...

    def parse_line(self, line: bytes) -> tuple[str, bytes] | None:
        """See :meth:`Format.parse`."""
        ...


class LineFormat:
    """A format of one or more log lines for each line of output."""

    lines = True

    def __init__(self, style: Style) -> None:
        self._style = style
        self._splitters: dict[str, LineSplitter] = {}

    def feed(self, stream: str, data: bytes, time_ns: int) -> Iterator[Chunk]:
        """See :meth:`Format.feed`."""
        splitter = self._splitter(stream)
        found = self._style.look(data)
        if splitter.rest:
            found |= self._style.look(splitter.rest)
        return self._format(splitter.feed(data), stream, time_ns, found)

    def finish(self, stream: str, time_ns: int) -> Iterator[Chunk]:
        """See :meth:`Format.finish`."""
        splitter = self._splitter(stream)
        found = self._style.look(splitter.rest)
        return self._format(splitter.finish(), stream, time_ns, found)

    def parse(self, line: bytes) -> tuple[str, bytes] | None:
        """See :meth:`Format.parse`."""
        return self._style.parse_line(line)

    def unfinished(self) -> dict[str, bytes]:
        """See :meth:`Format.unfinished`."""
        return {stream: splitter.rest for stream, splitter in self._splitters.items()}

    def resume(self, unfinished: Mapping[str, bytes]) -> None:
        """See :meth:`Format.resume`."""
        for stream, rest in unfinished.items():
            self._splitter(stream).rest = rest

    def _splitter(self, stream: str) -> LineSplitter:
        return self._splitters.setdefault(stream, LineSplitter())

    def _format(
        self, runs: Iterator[Run], stream: str, time_ns: int, found: frozenset[bytes]
    ) -> Iterator[Chunk]:
        timestamp = format_time(time_ns)
        for run in runs:
            done = self._style.format_run(run, stream, timestamp, found)
            yield Chunk(run.raw, done.pieces, done.lossy, run.whole, done.newlines)


class JsonFileFormat(LineFormat):
    """docker's json-file lines."""

    def __init__(self) -> None:
        super().__init__(json_file)


class CriFormat(LineFormat):
    """Kubernetes' lines."""

    def __init__(self) -> None:
        super().__init__(cri)


class RawFormat:
    """The bytes as they came."""

    lines = False

    def feed(self, stream: str, data: bytes, time_ns: int) -> Iterator[Chunk]:
        """See :meth:`Format.feed`."""
        del stream, time_ns
        yield Chunk(data, (data,), lossy=True, lines=False, newlines=data.count(b"\n"))

    def finish(self, stream: str, time_ns: int) -> Iterator[Chunk]:
        """See :meth:`Format.finish`."""
        del stream, time_ns
        yield from ()

    def parse(self, line: bytes) -> tuple[str, bytes] | None:
        """See :meth:`Format.parse`: whose bytes these are is not written anywhere."""
        del line
        return None

    def unfinished(self) -> dict[str, bytes]:
        """See :meth:`Format.unfinished`: nothing is kept back."""
        return {}

    def resume(self, unfinished: Mapping[str, bytes]) -> None:
        """See :meth:`Format.resume`."""


FORMATS: Mapping[str, Callable[[], Format]] = {"json-file": JsonFileFormat, "cri": CriFormat}
"""By the names that they have in a log file's URI."""


def format_time(time_ns: int) -> str:
    """A time as Go's RFC3339Nano has it: UTC, trailing zeros of the fraction cut."""
    seconds, nanoseconds = divmod(time_ns, 1_000_000_000)
    text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    fraction = f".{nanoseconds:09d}".rstrip("0") if nanoseconds else ""
    return f"{text}{fraction}Z"
