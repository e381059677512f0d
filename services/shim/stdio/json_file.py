r"""Lines of docker's json-file format, made and read in bulk.

    {"log":"text\n","stream":"stdout","time":"2006-01-02T15:04:05.999999999Z"}

Formatting works on runs of whole lines with bytes methods that run at memory speed. A piece of a
long line has no newline in its text, except the last. What is not UTF-8 becomes ``\ufffd``, one for
each byte, as in Go, and cannot be read back: such a run is marked lossy.
"""

from __future__ import annotations

import codecs
import json
import re
from typing import TYPE_CHECKING

from services.shim.stdio.lines import Formatted

if TYPE_CHECKING:
    from services.shim.stdio.lines import Run

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
# One search of each costs half of what it costs to look at every byte once with translate().
_CONTROLS = tuple(bytes((code,)) for code in range(32) if code not in (9, 10, 13))
_SPECIALS = (*(character for character, _ in _ESCAPES), *_CONTROLS)
_NOT_ASCII = b"\x80"
_ANY_CONTROL = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f]")
_SEPARATORS_HEAD = b"\xe2\x80"
_LINE_SEPARATORS = ((b"\xe2\x80\xa8", b"\\u2028"), (b"\xe2\x80\xa9", b"\\u2029"))
_LOSSY = "theseus-json-file"
_HEAD = b'{"log":"'


def _replace_bytes(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "\\ufffd" * (error.end - error.start), error.end


codecs.register_error(_LOSSY, _replace_bytes)


def look(data: bytes) -> frozenset[bytes]:
    """What in ``data`` has to be escaped; to be looked for in much data at once."""
    found = [character for character in _SPECIALS if character in data]
    if not data.isascii():
        found.append(_NOT_ASCII)
    return frozenset(found)


def format_run(run: Run, stream: str, timestamp: str, found: frozenset[bytes]) -> Formatted:
    """The log lines of a run; all get one ``timestamp``, the time at which it was read.

    Args:
        run: output.
        stream: of which stream.
        timestamp: as in the format.
        found: what :func:`look` found in data that the run is a part of.
    """
    text, lossy = _escape(run.raw, found) if found else (run.raw, False)
    tail = f'","stream":"{stream}","time":"{timestamp}"}}\n'.encode()
    if not run.whole:
        return Formatted((_HEAD, text.replace(b"\n", b"\\n"), tail), lossy)
    newline = b"\\n" + tail + _HEAD
    lines = text.replace(b"\n", newline)
    count = (len(lines) - len(text)) // (len(newline) - 1)
    # The run ends in a newline: the head of a line that is not there follows it.
    return Formatted((_HEAD, memoryview(lines)[: -len(_HEAD)]), lossy, count)


def parse_line(line: bytes) -> tuple[str, bytes] | None:
    """Stream and raw bytes of a log line; None when it is not one."""
    try:
        entry = json.loads(line)
        return entry["stream"], entry.get("log", "").encode()
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _escape(raw: bytes, found: frozenset[bytes]) -> tuple[bytes, bool]:
    for character, escaped in _ESCAPES:
        if character in found:
            raw = raw.replace(character, escaped)
    if not found.isdisjoint(_CONTROLS):
        raw = _ANY_CONTROL.sub(lambda match: b"\\u%04x" % match[0][0], raw)
    if _NOT_ASCII not in found or raw.isascii():
        return raw, False
    if _SEPARATORS_HEAD in raw:
        for character, escaped in _LINE_SEPARATORS:
            raw = raw.replace(character, escaped)
    try:
        raw.decode()
    except UnicodeDecodeError:
        return raw.decode(errors=_LOSSY).encode(), True
    return raw, False
