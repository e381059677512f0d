"""Six numbers of a process' streams, in memory that outlives the shim.

A memfd, mapped here and held open by the keeper as well: who takes over from a shim that was killed
reads how far it had come, and knows how much of the output was inside it.
"""

from __future__ import annotations

import mmap
import os
from typing import Final

HANDED: Final = 0
"""Offset in the output up to which an attached reader has got it."""
READ: Final = {"stdout": 1, "stderr": 2}
"""Bytes read of each stream."""
WRITTEN: Final = {"stdout": 3, "stderr": 4}
"""Bytes of each stream that are in the log, or are known to be lost."""
TAKEN: Final = 5
"""Bytes of input that the process was given."""

_SIZE = 8 * 6


class Meter:
    """The numbers by their index; each is written whole.

    Args:
        fd: memfd of an earlier shim's meter; negative: a new one.
    """

    def __init__(self, fd: int = -1) -> None:
        self.fd = fd
        if fd < 0:
            self.fd = os.memfd_create("theseus-shim-meter", os.MFD_CLOEXEC)
            os.ftruncate(self.fd, _SIZE)
        self._map = mmap.mmap(self.fd, _SIZE)
        self._numbers = memoryview(self._map).cast("Q")

    def __getitem__(self, index: int) -> int:
        return self._numbers[index]

    def __setitem__(self, index: int, value: int) -> None:
        self._numbers[index] = value

    def close(self) -> None:
        """Unmap; ``fd`` is the owner's to close."""
        self._numbers.release()
        self._map.close()
