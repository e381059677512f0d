"""Room on a disk: a reserve for when there is none left, and a floor that data must not pass.

Reading, stopping, removing and pruning need a little room themselves, for records. A file of some
megabytes holds it, and is removed when the disk is full; what is removed then makes room to have it
again. What brings data in is refused before it comes to that.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import structlog

from services.common.errors import ResourceExhausted

log = structlog.get_logger(__name__)

_HOLD_S = 30.0
_MIB = 1 << 20


class DiskReserve:
    """A file that keeps room for records. Methods that are not async block, briefly.

    Args:
        path: the file, on the disk that the records are on.
        size_bytes: how much it keeps; 0: nothing.
    """

    def __init__(self, path: Path, size_bytes: int) -> None:
        self.path = path
        self.size_bytes = size_bytes

    def hold(self) -> bool:
        """Have the file, if there is twice its room; returns whether it is there.

        Crash in between: a file that is too small, which the next call completes.
        """
        try:
            if self.path.stat().st_size == self.size_bytes:
                return True
        except FileNotFoundError:
            pass
        if not self.size_bytes or free_bytes(self.path.parent) < 2 * self.size_bytes:
            return False
        fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, self.size_bytes)
        except OSError as error:
            log.warning("no reserve on the disk", path=str(self.path), reason=error.strerror)
            self.path.unlink(missing_ok=True)
            return False
        finally:
            os.close(fd)
        return True

    def release(self) -> bool:
        """Give the room back; returns whether there was any."""
        try:
            held = self.path.stat().st_size > 0
            self.path.unlink()
        except FileNotFoundError:
            return False
        if held:
            log.warning(
                "the disk is full: its reserve is released, make room",
                path=str(self.path),
                bytes=self.size_bytes,
            )
        return held

    async def keep(self) -> None:
        """Have the file whenever there is room for it, until cancelled."""
        while True:
            await asyncio.to_thread(self.hold)
            await asyncio.sleep(_HOLD_S)

    def settle(self) -> None:
        """At a start: release the room on a disk that is full."""
        if free_bytes(self.path.parent) < _MIB:
            self.release()


class DiskFloor:
    """How much room must be left on a disk by what brings data in.

    Args:
        directory: where the data goes.
        floor_bytes: what has to stay free; 0: nothing.
    """

    def __init__(self, directory: Path, floor_bytes: int) -> None:
        self._directory = directory
        self._floor_bytes = floor_bytes

    def require(self, wanted_bytes: int = 0) -> None:
        """Refuse data that would leave less than the floor. Blocks, for a system call.

        Raises:
            ResourceExhausted: with the figures.
        """
        if not self._floor_bytes:
            return
        free = free_bytes(self._directory)
        if free - wanted_bytes < self._floor_bytes:
            wanted = f" {_mib(wanted_bytes)} are wanted," if wanted_bytes else ""
            raise ResourceExhausted(
                f"the disk of {self._directory} has {_mib(free)} free,{wanted} and "
                f"{_mib(self._floor_bytes)} must stay free: remove images or containers, or prune",
                reason="DISK_FULL",
            )


NO_FLOOR = DiskFloor(Path("/"), 0)
"""Of those who need not leave anything."""


def free_bytes(directory: Path) -> int:
    """What is free on the disk of a directory, for those without privilege."""
    status = os.statvfs(directory)
    return status.f_bavail * status.f_frsize


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / _MIB:.1f} MiB"
