"""What one image of a shim leaves to the next: a document in memory, and open descriptors.

The document is JSON with a format number, so that versions can tell whether they understand each
other. It lies in a memfd; the descriptors that it names are kept open over execve(2) by taking away
their close-on-exec flag, and get it back on the other side, lest a runtime inherit them.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
from typing import TYPE_CHECKING, Any

from services.common.errors import FailedPrecondition

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

FORMAT = 1
"""Version of the document; a shim takes over from one of the same format only."""

_PIECE_BYTES = 1 << 20


class Outgoing:
    """Collects the descriptors of a document under way."""

    def __init__(self) -> None:
        self._fds: set[int] = set()

    @property
    def fds(self) -> list[int]:
        """Every descriptor that the document names."""
        return sorted(self._fds)

    def fd(self, fd: int) -> int:
        """Have ``fd`` kept; returns it. A negative number stands for none."""
        if fd >= 0:
            self._fds.add(fd)
        return fd

    def data(self, data: bytes | bytearray | memoryview) -> str:
        """Bytes as the document holds them; see :func:`data_of`."""
        return base64.b64encode(data).decode()


def data_of(text: str) -> bytes:
    """Bytes out of a document."""
    return base64.b64decode(text)


def write(document: Mapping[str, Any]) -> int:
    """Put a document into a memfd; the caller closes it. It is inherited by an executed program."""
    fd = os.memfd_create("theseus-shim-handover", 0)
    try:
        view = memoryview(json.dumps({**document, "format": FORMAT}).encode())
        while view:
            view = view[os.write(fd, view[:_PIECE_BYTES]) :]
    except BaseException:
        os.close(fd)
        raise
    return fd


def read(fd: int) -> dict[str, Any]:
    """A document out of a memfd, which stays open.

    Raises:
        FailedPrecondition: it is none, or of a format that this version does not understand.
    """
    pieces = []
    position = 0
    while piece := os.pread(fd, _PIECE_BYTES, position):
        pieces.append(piece)
        position += len(piece)
    try:
        document = json.loads(b"".join(pieces))
        found = document["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise FailedPrecondition("what the shim was handed over is no document") from error
    if found != FORMAT:
        raise FailedPrecondition(
            f"what the shim was handed over has format {found}, this version understands {FORMAT}"
        )
    return dict(document)


def keep_over_exec(fds: Iterable[int], *, keep: bool) -> None:
    """Set whether descriptors stay open over execve(2); those that are closed do not matter."""
    for fd in fds:
        with contextlib.suppress(OSError):
            os.set_inheritable(fd, keep)
