r"""Reading a log that the shim writes: lines of docker's json-file format, in rotated files.

    <path>.2  <path>.1  <path>       oldest to newest
    {"log":"text\n","stream":"stdout","time":"2006-01-02T15:04:05.999999999Z"}

The writer renames ``path`` to ``path.1`` (and so on) and begins a new file; a reader that is in the
middle of one finds its way by the file's inode. Everything here blocks: call it in a thread.
"""

from __future__ import annotations

import calendar
import json
import os
import re
import time
from typing import TYPE_CHECKING

from services.common.frozen import frozen
from services.daemon.containers.runtime import StreamKind

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from pathlib import Path

_BLOCK_BYTES = 256 << 10
_TAIL_BLOCK_BYTES = 64 << 10
_TIME = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d{1,9})\d*)?Z")
_STREAMS = {"stdout": StreamKind.STDOUT, "stderr": StreamKind.STDERR}


@frozen
class LogEntry:
    """A line with its end, or a part of a long one."""

    timestamp_ns: int
    stream: StreamKind
    data: bytes


class LogCursor:
    """A place in a log, moving towards its end. The caller closes it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = -1
        self._rest = b""
        self._times = _TimeParser()

    def close(self) -> None:
        """Close the file that is open."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def to_start(self) -> None:
        """Go to the oldest line that is left."""
        files = self._files()
        if files:
            self._open(files[0])

    def to_tail(self, lines: int, streams: Collection[StreamKind]) -> None:
        """Go to where the last ``lines`` lines of some streams begin."""
        counter = _LineCounter(lines, streams)
        for path in reversed(self._files()):
            self._open(path)
            size = os.fstat(self._fd).st_size
            for end, line in _lines_backwards(self._fd, size):
                if counter.is_boundary(self._parse(line)):
                    os.lseek(self._fd, end, os.SEEK_SET)
                    return
            os.lseek(self._fd, 0, os.SEEK_SET)
        # all of it: the oldest file is open at its beginning

    def read(self) -> list[LogEntry]:
        """The next entries; empty at the end, where more may come later."""
        while True:
            if self._fd < 0 and not self._open_first():
                return []
            block = os.read(self._fd, _BLOCK_BYTES)
            if not block:
                if not self._to_newer():
                    return []
                continue
            *lines, self._rest = (self._rest + block).split(b"\n")
            entries = [entry for line in lines if (entry := self._parse(line)) is not None]
            if entries:
                return entries

    def _open_first(self) -> bool:
        files = self._files()
        if files:
            self._open(files[0])
        return bool(files)

    def _to_newer(self) -> bool:
        """Open the file after this one; False when this is the newest."""
        files = self._files()
        mine = os.fstat(self._fd)
        for position, path in enumerate(files):
            if _same(path, mine):
                if position + 1 == len(files):
                    return False
                self._open(files[position + 1])
                return True
        if not files:
            return False
        self._open(files[0])  # ours was rotated away: go on with the oldest that is left
        return True

    def _files(self) -> list[Path]:
        """The files that there are, oldest first."""
        found: list[Path] = [self._path] if self._path.exists() else []
        number = 1
        while (rotated := self._path.with_name(f"{self._path.name}.{number}")).exists():
            found.insert(0, rotated)
            number += 1
        return found

    def _open(self, path: Path) -> None:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:  # renamed just now: look again at the next read
            self.close()
            return
        self.close()
        self._fd, self._rest = fd, b""

    def _parse(self, line: bytes) -> LogEntry | None:
        """None for a line that is damaged, as after a full disk."""
        try:
            value = json.loads(line)
            timestamp_ns = self._times.parse(value["time"])
            return LogEntry(
                timestamp_ns,
                _STREAMS[value["stream"]],
                value["log"].encode("utf-8", "surrogatepass"),
            )
        except (ValueError, KeyError, TypeError, AttributeError):
            return None


class _LineCounter:
    """Counts lines from the last one backwards."""

    def __init__(self, lines: int, streams: Collection[StreamKind]) -> None:
        self._wanted = lines
        self._streams = streams
        self._counted = 0
        self._begun = False

    def is_boundary(self, entry: LogEntry | None) -> bool:
        """Whether the lines wanted begin behind ``entry``."""
        if self._wanted == 0:
            return True
        if entry is None or entry.stream not in self._streams:
            return False
        if not self._begun:  # the last one, whether it is finished or not
            self._begun, self._counted = True, 1
            return False
        if not entry.data.endswith(b"\n"):  # the beginning of a long line
            return False
        if self._counted == self._wanted:
            return True
        self._counted += 1
        return False


class _TimeParser:
    """Parses RFC 3339 times in UTC; consecutive ones mostly share their second."""

    def __init__(self) -> None:
        self._text = ""
        self._seconds = 0

    def parse(self, text: str) -> int:
        """Nanoseconds since the epoch."""
        match = _TIME.fullmatch(text)
        if match is None:
            raise ValueError(f"not a time: {text}")
        if match[1] != self._text:
            self._text = match[1]
            self._seconds = calendar.timegm(time.strptime(match[1], "%Y-%m-%dT%H:%M:%S"))
        return self._seconds * 1_000_000_000 + int((match[2] or "0").ljust(9, "0"))


def _lines_backwards(fd: int, size: int) -> Iterator[tuple[int, bytes]]:
    """Whole lines from the last to the first, each with the offset of its end."""
    position, rest, end = size, b"", size
    first = True
    while position > 0:
        length = min(_TAIL_BLOCK_BYTES, position)
        position -= length
        data = os.pread(fd, length, position) + rest
        rest, *lines = data.split(b"\n")
        for line in reversed(lines):
            if not first:
                yield end, line
            first = False  # what follows the last newline is empty, or not yet a whole line
            end -= len(line) + 1
    if rest and not first:
        yield end, rest


def _same(path: Path, mine: os.stat_result) -> bool:
    try:
        found = path.stat()
    except FileNotFoundError:
        return False
    return (found.st_dev, found.st_ino) == (mine.st_dev, mine.st_ino)
