r"""Lines of docker's json-file format, made and read in bulk.

    {"log":"text\n","stream":"stdout","time":"2006-01-02T15:04:05.999999999Z"}

Formatting works on runs of whole lines with bytes methods that run at memory speed, never line by
line. A line longer than 16 KiB is cut into pieces without a newline, except the last, as docker
does; never inside a character. What is not UTF-8 becomes ``\ufffd``, one for each byte, as in Go,
and cannot be read back: such a run is marked lossy.
"""

from __future__ import annotations

import codecs
import json
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

LINE_MAX_BYTES = 16384

# What Go's encoder escapes (encoding/json with HTML escaping), in the order in which it has to
# be done: the backslash first.
_ESCAPES = (
    (b"\\", b"\\\\"),
    (b'"', b'\\"'),
    (b"<", b"\\u003c"),
    (b">", b"\\u003e"),
    (b"&", b"\\u0026"),
    (b"\r", b"\\r"),
    (b"\t", b"\\u0009"),
)
_CONTROLS = bytes(range(32))
_OTHER_CONTROLS = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f]")
_LINE_SEPARATORS = ((b"\xe2\x80\xa8", b"\\u2028"), (b"\xe2\x80\xa9", b"\\u2029"))
_LOSSY = "theseus-json-file"


def _replace_bytes(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "\\ufffd" * (error.end - error.start), error.end


codecs.register_error(_LOSSY, _replace_bytes)


@dataclass(frozen=True, slots=True)
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


@dataclass(frozen=True, slots=True)
class Formatted:
    """Log lines.

    Attributes:
        data: the lines.
        lossy: whether the raw bytes cannot be had back from them.
    """

    data: bytes
    lossy: bool


def format_run(run: Run, stream: str, timestamp: str) -> Formatted:
    """The log lines of a run; all get one ``timestamp``, the time at which it was read."""
    text, lossy = _escape(run.raw)
    head = b'{"log":"'
    tail = f'","stream":"{stream}","time":"{timestamp}"}}\n'.encode()
    if not run.whole:
        return Formatted(head + text.replace(b"\n", b"\\n") + tail, lossy)
    lines = text.replace(b"\n", b"\\n" + tail + head)
    # The run ends in a newline: the head of a line that is not there follows it.
    return Formatted(head + lines[: -len(head)], lossy)


def format_time(time_ns: int) -> str:
    """A time as Go's RFC3339Nano has it: UTC, trailing zeros of the fraction cut."""
    seconds, nanoseconds = divmod(time_ns, 1_000_000_000)
    text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    fraction = f".{nanoseconds:09d}".rstrip("0") if nanoseconds else ""
    return f"{text}{fraction}Z"


def parse_line(line: bytes) -> tuple[str, bytes] | None:
    """Stream and raw bytes of a log line; None when it is not one."""
    try:
        entry = json.loads(line)
        return entry["stream"], entry.get("log", "").encode()
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


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


def _escape(raw: bytes) -> tuple[bytes, bool]:
    for character, escaped in _ESCAPES:
        if character in raw:
            raw = raw.replace(character, escaped)
    if len(raw.translate(None, _CONTROLS)) != len(raw) - raw.count(b"\n"):
        raw = _OTHER_CONTROLS.sub(lambda match: b"\\u%04x" % match[0][0], raw)
    if raw.isascii():
        return raw, False
    for character, escaped in _LINE_SEPARATORS:
        raw = raw.replace(character, escaped)
    try:
        raw.decode()
    except UnicodeDecodeError:
        return raw.decode(errors=_LOSSY).encode(), True
    return raw, False


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
