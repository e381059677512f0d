"""Tables and figures as docker prints them."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from google.protobuf.timestamp_pb2 import Timestamp

SHORT_ID = 12
_MINUTE, _HOUR, _DAY = 60, 3600, 86400
_WEEK, _MONTH, _YEAR = 7 * _DAY, 30 * _DAY, 365 * _DAY
_STEPS = (
    (120, _MINUTE, "minute"),
    (48 * _HOUR, _HOUR, "hour"),
    (2 * _WEEK, _DAY, "day"),
    (2 * _MONTH, _WEEK, "week"),
    (2 * _YEAR, _MONTH, "month"),
)
_PREFIXES = ("B", "kB", "MB", "GB", "TB")


def write(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print columns as wide as their widest cell, three blanks apart."""
    lines = [headings, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headings))]
    for line in lines:
        padded = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        sys.stdout.write("   ".join(padded).rstrip() + "\n")


def short(identity: str) -> str:
    """The first twelve digits of an id or digest."""
    return identity.rpartition(":")[2][:SHORT_ID]


def duration(seconds: float) -> str:
    """How long, in words: ``5 minutes``, ``About an hour``."""
    if seconds < 1:
        return "Less than a second"
    if seconds < _MINUTE:
        return _plural(int(seconds), "second")
    if seconds < 2 * _MINUTE:
        return "About a minute"
    if seconds < _HOUR:
        return _plural(int(seconds / _MINUTE), "minute")
    if round(seconds / _HOUR) == 1:
        return "About an hour"
    for limit, unit, name in _STEPS[1:]:
        if seconds < limit:
            return _plural(int(seconds / unit), name)
    return _plural(int(seconds / _YEAR), "year")


def ago(moment: Timestamp) -> str:
    """How long ago, in words; ``N/A`` for never."""
    if moment.ToNanoseconds() == 0:
        return "N/A"
    return f"{duration(time.time() - moment.ToNanoseconds() / 1e9)} ago"


def size(count: int) -> str:
    """Bytes with three digits and a unit of a power of 1000."""
    figure = float(count)
    for prefix in _PREFIXES:
        if float(f"{figure:.3g}") < 1000:
            return f"{figure:.3g}{prefix}"
        if prefix != _PREFIXES[-1]:
            figure /= 1000
    return f"{figure:.0f}{prefix}"


def _plural(number: int, name: str) -> str:
    return f"{number} {name}" if number == 1 else f"{number} {name}s"
