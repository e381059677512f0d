"""Signals as users write them: ``TERM``, ``SIGTERM``, ``15``, ``RTMIN+3``."""

from __future__ import annotations

import re
import signal

from services.common.errors import InvalidArgument

_REAL_TIME = re.compile(r"(RTMIN|RTMAX)([+-]\d+)?")
_HIGHEST = int(signal.SIGRTMAX)


def parse_signal(text: str, *, default: int) -> int:
    """The number of a signal; an empty text stands for ``default``.

    Raises:
        InvalidArgument: there is no such signal.
    """
    if not text:
        return default
    if text.isascii() and text.isdigit():
        number = int(text)
        if 0 < number <= _HIGHEST:
            return number
        raise _invalid(text)
    name = text.upper().removeprefix("SIG")
    if match := _REAL_TIME.fullmatch(name):
        base = signal.SIGRTMIN if match[1] == "RTMIN" else signal.SIGRTMAX
        number = int(base) + int(match[2] or 0)
        if signal.SIGRTMIN <= number <= signal.SIGRTMAX:
            return number
        raise _invalid(text)
    try:
        return int(signal.Signals[f"SIG{name}"])
    except KeyError:
        raise _invalid(text) from None


def _invalid(text: str) -> InvalidArgument:
    return InvalidArgument(f"invalid signal: {text}", field="signal")
