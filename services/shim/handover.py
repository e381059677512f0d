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
"""Version of the document of a shim with one member; one with more has the next."""
FORMATS = (FORMAT, FORMAT + 1)
"""Versions that this program understands."""

_FD_KEYS = frozenset({"fd", "writer_fd", "master", "meter", "pidfd"})
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

    def file(self, fd: int) -> int:
        """Have an open file kept, which could be opened again by its path."""
        return self.fd(fd)

    def data(self, data: bytes | bytearray | memoryview) -> str:
        """Bytes as the document holds them; see :func:`data_of`."""
        return base64.b64encode(data).decode()


class Skeleton(Outgoing):
    """What is written down for a shim that did not see this one die: files by path, no bytes."""

    def file(self, fd: int) -> int:
        """See :meth:`Outgoing.file`: not kept."""
        return -1

    def data(self, data: bytes | bytearray | memoryview) -> str:
        """See :meth:`Outgoing.data`: not kept."""
        return ""


def renamed(document: Any, names: Mapping[Any, Any]) -> Any:
    """A packed document with every descriptor replaced by what ``names`` has for it, or -1."""
    if isinstance(document, dict):
        return {
            key: names.get(value, -1) if key in _FD_KEYS else renamed(value, names)
            for key, value in document.items()
        }
    if isinstance(document, (list, tuple)):
        return [renamed(entry, names) for entry in document]
    return document


def named(document: Any) -> set[int]:
    """Every descriptor that a packed document names."""
    if isinstance(document, dict):
        own = {v for k, v in document.items() if k in _FD_KEYS and isinstance(v, int)}
        return own.union(*(named(value) for value in document.values()))
    if isinstance(document, (list, tuple)):
        return set().union(*(named(entry) for entry in document))
    return set()


def data_of(text: str) -> bytes:
    """Bytes out of a document."""
    return base64.b64decode(text)


def format_of(document: Mapping[str, Any]) -> int:
    """The lowest format that a document can be written in."""
    return FORMAT + 1 if document.get("further") else FORMAT


def write(document: Mapping[str, Any]) -> int:
    """Put a document into a memfd; the caller closes it. It is inherited by an executed program."""
    fd = os.memfd_create("theseus-shim-handover", 0)
    try:
        view = memoryview(json.dumps({**document, "format": format_of(document)}).encode())
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
    if found not in FORMATS:
        raise FailedPrecondition(
            f"what the shim was handed over has format {found}, this version understands {FORMATS}"
        )
    return dict(document)


def keep_over_exec(fds: Iterable[int], *, keep: bool) -> None:
    """Set whether descriptors stay open over execve(2); those that are closed do not matter."""
    for fd in fds:
        with contextlib.suppress(OSError):
            os.set_inheritable(fd, keep)
