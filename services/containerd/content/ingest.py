"""The data file of one ingest and the hash of what is in it. Everything here blocks.

<root>/content/ingest/<id>/data
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from services.common.disk import NO_FLOOR
from services.common.errors import ResourceExhausted
from services.containerd.content.digest import hasher, split_digest
from services.containerd.content.store import CHUNK_BYTES

if TYPE_CHECKING:
    from pathlib import Path

    from services.common.disk import DiskFloor


_CHECKED_BYTES = 8 << 20


class IngestFile:
    """An open data file: appended to, hashed while written, sealed before it becomes a blob."""

    def __init__(self, directory: Path, *, expected: str = "", floor: DiskFloor = NO_FLOOR) -> None:
        """Open the file, make it if need be, and hash what an earlier writer left in it.

        What was left may be damaged after a power cut; the digest tells, at the commit.
        """
        self.path = directory / "data"
        self._floor = floor
        self._unchecked_bytes = 0  # written since there was last looked for room
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._rehash(expected)

    @property
    def digest(self) -> str:
        """Digest of the bytes in the file."""
        return f"{self._hash.name}:{self._hash.hexdigest()}"

    def append(self, data: bytes) -> None:
        """Write ``data`` at the end.

        Raises:
            ResourceExhausted: the disk is full, or so full that nothing more may come in.
        """
        self._unchecked_bytes += len(data)
        if self._unchecked_bytes > _CHECKED_BYTES:
            self._floor.require()
            self._unchecked_bytes = 0
        view = memoryview(data)
        try:
            while view:
                written = os.write(self._fd, view)
                self._hash.update(view[:written])
                self.size_bytes += written
                view = view[written:]
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise ResourceExhausted(
                    f"no space for a blob after {self.size_bytes} bytes: free some below "
                    f"{self.path.parents[2]}"
                ) from error
            raise

    def truncate(self) -> None:
        """Begin again with nothing."""
        os.ftruncate(self._fd, 0)
        os.lseek(self._fd, 0, os.SEEK_SET)
        self._hash = hasher(self.digest)
        self.size_bytes = 0

    def digest_as(self, expected: str) -> str:
        """Digest of the bytes with the algorithm of ``expected``; reads them if that is new."""
        if split_digest(expected)[0] != self._hash.name:
            self._rehash(expected)
        return self.digest

    def seal(self) -> None:
        """Make it read-only and put it on the disk; nothing is written afterwards."""
        os.fchmod(self._fd, 0o444)
        os.fsync(self._fd)
        self.close()

    def close(self) -> None:
        """Close the file, and keep it. Idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _rehash(self, expected: str) -> None:
        self._hash = hasher(expected)
        self.size_bytes = 0
        os.lseek(self._fd, 0, os.SEEK_SET)
        while data := os.read(self._fd, CHUNK_BYTES):
            self._hash.update(data)
            self.size_bytes += len(data)
