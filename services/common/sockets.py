"""Unix sockets that a tier listens on, and the paths where they are found.

A socket is bound beside its place and moved there by a rename over whatever is there: so, during a
replacement, there is always one to connect to. Whoever ends takes away its own, and leaves that of
a successor alone.
"""

from __future__ import annotations

import grp
import os
import socket
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING

import structlog

from services.common.errors import InvalidArgument

if TYPE_CHECKING:
    from pathlib import Path

log = structlog.get_logger(__name__)

SOCKET_GROUP = "theseus"
UNIX_PATH_MAX_BYTES = 107


class Place:
    """The path of a listening socket.

    Attributes:
        path: it.
        new: where a socket may be bound that is then moved there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.new = path.with_name(f"{path.name}.new")
        self._inode = 0

    def take(self, bound: Path | None = None) -> None:
        """Move a socket here from where it is bound; ``new``, unless that is said.

        Raises:
            OSError: that cannot be done.
        """
        bound = bound or self.new
        self._inode = bound.stat().st_ino
        bound.rename(self.path)

    def recognise(self) -> None:
        """Know the socket that is here as one's own.

        Raises:
            OSError: there is none.
        """
        self._inode = self.path.stat().st_ino

    def leave(self) -> None:
        """Take one's own socket away; one that a successor has put here stays."""
        with suppress(FileNotFoundError):
            if self.path.stat().st_ino == self._inode:
                self.path.unlink()


def listen(path: Path, *, mode: int, backlog: int) -> socket.socket:
    """A stream socket that listens at ``path``, in place of what a crash has left there.

    Raises:
        OSError: there can be none.
    """
    listener = socket.socket(socket.AF_UNIX)
    try:
        path.unlink(missing_ok=True)
        listener.bind(str(path))
        path.chmod(mode)
        listener.listen(backlog)
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    return listener


def let_group_in(path: Path) -> None:
    """Give a socket to the group that may connect, where there is one."""
    group = socket_group()
    if group is not None:
        os.chown(path, -1, group)


@cache
def socket_group() -> int | None:
    """Id of the group that may connect; None where it does not exist. Asked once: it is slow."""
    try:
        return grp.getgrnam(SOCKET_GROUP).gr_gid
    except KeyError:
        log.debug("socket group does not exist", group=SOCKET_GROUP)
        return None


def check_socket_path(path: Path) -> None:
    """Refuse a path that does not fit a Unix socket's address (unix(7)).

    Raises:
        InvalidArgument: it is longer than 107 bytes.
    """
    length = len(os.fsencode(path))
    if length > UNIX_PATH_MAX_BYTES:
        raise InvalidArgument(
            f"socket path {path} has {length} bytes, a Unix socket's may have at most "
            f"{UNIX_PATH_MAX_BYTES}: choose a shorter state directory"
        )
