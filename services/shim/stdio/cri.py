"""Lines of Kubernetes' log format (CRI), made and read in bulk.

    2006-01-02T15:04:05.999999999Z stdout F text

``P`` instead of ``F`` marks a piece of a line that goes on in the next one of the stream. The text
is the output as it was, whatever its bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.shim.stdio.lines import Formatted

if TYPE_CHECKING:
    from services.shim.stdio.lines import Run

_TAGS = {b"F": b"\n", b"P": b""}


def look(data: bytes) -> frozenset[bytes]:
    """What in ``data`` has to be escaped: nothing."""
    del data
    return frozenset()


def format_run(run: Run, stream: str, timestamp: str, found: frozenset[bytes]) -> Formatted:
    """The log lines of a run; all get one ``timestamp``, the time at which it was read."""
    del found
    if not run.whole:
        return Formatted((f"{timestamp} {stream} P ".encode(), run.raw, b"\n"), False)
    head = f"{timestamp} {stream} F ".encode()
    lines = run.raw.replace(b"\n", b"\n" + head)
    count = (len(lines) - len(run.raw)) // len(head)
    # The run ends in a newline: the head of a line that is not there follows it.
    return Formatted((head, memoryview(lines)[: -len(head)]), False, count)


def parse_line(line: bytes) -> tuple[str, bytes] | None:
    """Stream and raw bytes of a log line; None when it is not one."""
    words = line.removesuffix(b"\n").split(b" ", 3)
    if len(words) != 4 or words[2] not in _TAGS or words[1] not in (b"stdout", b"stderr"):
        return None
    return words[1].decode(), words[3] + _TAGS[words[2]]
