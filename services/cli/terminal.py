"""The user's terminal: raw mode, its size, and the keys that detach from a process."""

from __future__ import annotations

import os
import sys
import termios
import tty
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DETACH_KEYS = b"\x10\x11"
"""ctrl-p, ctrl-q"""


def is_terminal(fd: int) -> bool:
    """Whether ``fd`` is a terminal."""
    return os.isatty(fd)


def size() -> tuple[int, int]:
    """Columns and rows of the terminal; (0, 0) when there is none."""
    for stream in (sys.stdout, sys.stdin):
        try:
            columns, rows = os.get_terminal_size(stream.fileno())
        except OSError:
            continue
        return columns, rows
    return 0, 0


@contextmanager
def raw(fd: int) -> Iterator[None]:
    """Pass each key on as it is, inside the block; what the terminal was before comes back."""
    before = termios.tcgetattr(fd)
    tty.setraw(fd, termios.TCSANOW)
    try:
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


class DetachFilter:
    """Finds the detach keys in what is typed.

    Args:
        detach: called once, when all keys were typed in order.
    """

    def __init__(self, detach: Callable[[], None], keys: bytes = DETACH_KEYS) -> None:
        self._detach = detach
        self._keys = keys
        self._matched = 0

    def __call__(self, data: bytes) -> bytes:
        """What of ``data`` goes to the process: a beginning of the keys waits for what follows."""
        passed = bytearray()
        for byte in data:
            if byte == self._keys[self._matched]:
                self._matched += 1
                if self._matched == len(self._keys):
                    self._matched = 0
                    self._detach()
                    break
                continue
            passed += self._keys[: self._matched]
            self._matched = 1 if byte == self._keys[0] else 0
            if not self._matched:
                passed.append(byte)
        return bytes(passed)
