"""Reads one pipe or terminal of a process and gives the bytes to a sink, as fast as it wants them.

Reads grow with the writer: a process that fills the pipe gets larger reads and a larger pipe
(F_SETPIPE_SZ), one that prints a line now and then costs a few KiB.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from services.shim.handover import Outgoing
    from services.shim.stdio.sink import Sink

READ_MIN_BYTES = 16 << 10
READ_MAX_BYTES = 1 << 20


class Pump:
    """Owns the reading end ``fd``, which is non-blocking, and closes it at its end.

    Args:
        fd: pipe or terminal master.
        stream: its name, for the sink.
        sink: takes the bytes.
        read: called with each piece that was read, for the metrics.
        owns_fd: whether to close ``fd``; a terminal's master is also written to, and closed by its
            owner.
        close: closes it.
    """

    def __init__(
        self,
        fd: int,
        stream: str,
        sink: Sink,
        *,
        read: Callable[[str, bytes], None],
        owns_fd: bool = True,
        close: Callable[[int], None] = os.close,
    ) -> None:
        self._close = close
        self._fd = fd
        self._stream = stream
        self._sink = sink
        self._read = read
        self._owns_fd = owns_fd
        self._size = READ_MIN_BYTES
        self._enlarged = False
        self._reading = False
        self._paused = False
        self._loop = asyncio.get_running_loop()
        self.done = asyncio.Event()

    def start(self) -> None:
        """Begin to read."""
        self._resume()

    def pause(self) -> None:
        """Stop reading for now; everything that was read is the sink's."""
        self._paused = True
        if self._reading:
            self._reading = False
            self._loop.remove_reader(self._fd)

    def resume(self) -> None:
        """Go on after :meth:`pause`."""
        self._paused = False
        self._resume()

    def pack(self, out: Outgoing) -> dict[str, Any] | None:
        """What the next image of the shim goes on with; None when the end was read."""
        if self.done.is_set():
            return None
        return {"fd": out.fd(self._fd), "stream": self._stream, "owns_fd": self._owns_fd}

    async def settle(self) -> None:
        """Take what is in the pipe now, and wait until the sink has it where it belongs."""
        budget = READ_MAX_BYTES
        while budget > 0 and not self.done.is_set() and self._sink.ready:
            taken = self._take()
            if taken <= 0:
                break
            budget -= taken
        await self._sink.settle()

    def stop(self) -> None:
        """Read no more, whatever is left in the pipe."""
        self._end()

    def _resume(self) -> None:
        if not self.done.is_set() and not self._reading and not self._paused:
            self._reading = True
            self._loop.add_reader(self._fd, self._readable)

    def _readable(self) -> None:
        self._take()
        if not self.done.is_set() and not self._sink.ready:
            self._reading = False
            self._loop.remove_reader(self._fd)
            self._sink.when_ready(self._resume)

    def _take(self) -> int:
        """Read once; returns the number of bytes, 0 at the end, -1 when there is nothing now."""
        try:
            data = os.read(self._fd, self._size)
        except BlockingIOError:
            return -1
        except OSError as error:
            # A terminal whose other end is closed (pty(7)).
            if error.errno != errno.EIO:
                raise
            data = b""
        if not data:
            self._end()
            return 0
        self._adapt(len(data))
        self._read(self._stream, data)
        self._sink.write(self._stream, data)
        return len(data)

    def _adapt(self, taken: int) -> None:
        if taken == self._size and self._size < READ_MAX_BYTES:
            self._size *= 2
            if self._size > 64 << 10 and not self._enlarged:
                self._enlarged = True
                # Not a pipe, or no memory to spare for this user (pipe(7)): as it is, then.
                with contextlib.suppress(OSError):
                    fcntl.fcntl(self._fd, fcntl.F_SETPIPE_SZ, READ_MAX_BYTES)
        elif taken < self._size // 8 and self._size > READ_MIN_BYTES:
            self._size //= 2

    def _end(self) -> None:
        if self.done.is_set():
            return
        self.done.set()
        if self._reading:
            self._loop.remove_reader(self._fd)
        if self._owns_fd:
            self._close(self._fd)
        self._sink.finish(self._stream)
