"""Terminals: the socket over which a runtime hands over a terminal's master, and its size.

The socket lies in the bundle, whose path may be longer than a Unix socket's address allows: both
sides reach it through ``/proc/<pid of the shim>/fd/<directory>`` instead.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import socket
import struct
import termios
from typing import TYPE_CHECKING, Self

from services.common.errors import Internal

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

_HANDOVER_LIMIT_S = 5.0


class ConsoleSocket:
    """A context manager: a listening socket in ``directory`` that is gone after the block."""

    def __init__(self, directory: Path, name: str) -> None:
        self._file = directory / f"{name}.sock"
        self._directory_fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.address = f"/proc/{os.getpid()}/fd/{self._directory_fd}/{self._file.name}"

    def __enter__(self) -> Self:
        self._file.unlink(missing_ok=True)
        self._socket.bind(self.address)
        self._file.chmod(0o600)
        self._socket.listen(1)
        self._socket.setblocking(False)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._socket.close()
        os.close(self._directory_fd)
        self._file.unlink(missing_ok=True)

    async def receive(self) -> int:
        """The terminal's master, non-blocking; the caller closes it.

        Raises:
            Internal: the runtime handed over none.
        """
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(_HANDOVER_LIMIT_S):
                connection, _ = await loop.sock_accept(self._socket)
        except TimeoutError as error:
            raise Internal("the runtime did not hand over the terminal of the process") from error
        with connection:
            connection.setblocking(True)
            connection.settimeout(_HANDOVER_LIMIT_S)
            try:
                _, fds, _, _ = await asyncio.to_thread(socket.recv_fds, connection, 4096, 1)
            except OSError as error:
                raise Internal(
                    f"the runtime did not hand over the terminal of the process: {error}"
                ) from error
        if len(fds) != 1:
            for fd in fds:
                os.close(fd)
            raise Internal("the runtime handed over something that is not one terminal")
        os.set_inheritable(fds[0], False)
        os.set_blocking(fds[0], False)
        return fds[0]


def resize(master: int, *, width: int, height: int) -> None:
    """Set a terminal's size in characters (ioctl_tty(2))."""
    size = struct.pack("HHHH", min(height, 0xFFFF), min(width, 0xFFFF), 0, 0)
    # The other end may be closed already: a size nobody sees.
    with contextlib.suppress(OSError):
        fcntl.ioctl(master, termios.TIOCSWINSZ, size)
