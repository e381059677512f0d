"""Lengths of time as upstream writes them, which are Go's: ``100ms``, ``1m30s``, ``0``."""

from __future__ import annotations

import re

_PART = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ns|us|\u00b5s|\u03bcs|ms|s|m|h)")
_UNITS_S = {
    "ns": 1e-9,
    "us": 1e-6,
    "\u00b5s": 1e-6,  # the micro sign, and the Greek letter
    "\u03bcs": 1e-6,
    "ms": 0.001,
    "s": 1.0,
    "m": 60.0,
    "h": 3600.0,
}


def parse_duration(text: str) -> float | None:
    """Seconds; None if it is no such length, or a negative one."""
    if text == "0":
        return 0.0
    found = list(_PART.finditer(text))
    if not found or "".join(match[0] for match in found) != text:
        return None
    return sum(float(match[1]) * _UNITS_S[match[2]] for match in found)


def format_duration(seconds: float) -> str:
    """The same backwards, in parts that Go uses, too."""
    if 0 < seconds < 1:
        return f"{seconds * 1000:g}ms"
    minutes, rest = divmod(seconds, 60)
    if not minutes:
        return f"{rest:g}s"
    hours, minutes = divmod(int(minutes), 60)
    return f"{hours}h{minutes}m{rest:g}s" if hours else f"{minutes}m{rest:g}s"
