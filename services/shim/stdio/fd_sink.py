"""A sink that passes output on to a FIFO or a pipe: what its reader does not take, waits."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any, Self

from services.common.errors import FailedPrecondition
from services.shim.handover import data_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from services.shim.handover import Outgoing


class FdSink:
    """Writes to ``fd``, which is non-blocking, and closes it once all streams have finished.

    Args:
        fd: where to write.
        streams: number of streams that share it.
        close: closes it.
    """

    def __init__(
        self, fd: int, *, streams: int = 1, close: Callable[[int], None] = os.close
    ) -> None:
        self._fd = fd
        self._close_fd = close
        self._streams = streams
        self._waiting = b""
        self._writing = False
        self._callbacks: list[Callable[[], None]] = []
        self._loop = asyncio.get_running_loop()

    @property
    def ready(self) -> bool:
        """Whether all was written."""
        return not self._waiting

    def when_ready(self, callback: Callable[[], None]) -> None:
        """See :meth:`Sink.when_ready`."""
        if self.ready:
            self._loop.call_soon(callback)
        else:
            self._callbacks.append(callback)

    def write(self, stream: str, data: bytes) -> None:
        """Write, or keep what does not fit."""
        del stream
        if self._fd < 0:
            return
        self._waiting += data
        self._flush()

    def finish(self, stream: str) -> None:
        """Close once the last stream is through and written."""
        del stream
        self._streams -= 1
        if self._streams <= 0 and not self._waiting:
            self._close()

    async def settle(self) -> None:
        """Nothing to wait for: the reader may take its time."""

    async def close(self) -> None:
        """Give up what its reader did not take."""
        self._close()

    def pack(self, out: Outgoing) -> dict[str, Any]:
        """What the next image of the shim goes on with."""
        return {
            "kind": "fd",
            "fd": out.fd(self._fd),
            "streams": self._streams,
            "waiting": out.data(self._waiting),
        }

    @classmethod
    def unpack(cls, saved: Mapping[str, Any], *, close: Callable[[int], None]) -> Self:
        """The sink that was packed."""
        sink = cls(saved["fd"], streams=saved["streams"], close=close)
        sink.write("", data_of(saved["waiting"]))
        return sink

    def _flush(self) -> None:
        view, written = memoryview(self._waiting), 0
        try:
            while written < len(view):
                written += os.write(self._fd, view[written:])
            self._waiting = b""
        except BlockingIOError:
            self._waiting = bytes(view[written:])
            if not self._writing:
                self._writing = True
                self._loop.add_writer(self._fd, self._flush)
            return
        except OSError:  # its reader is gone for good
            self._close()
        self._stop_writing()
        callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()
        if self._streams <= 0:
            self._close()

    def _stop_writing(self) -> None:
        if self._writing:
            self._writing = False
            self._loop.remove_writer(self._fd)

    def _close(self) -> None:
        if self._fd < 0:
            return
        self._stop_writing()
        self._close_fd(self._fd)
        self._fd = -1
        self._waiting = b""


def open_output(path: Path, *, field: str) -> int:
    """Open a FIFO, or an existing file to append to, without waiting for a reader.

    A FIFO is opened for reading too, so that a client that goes away and comes back does not break
    it (fifo(7)); its writer then waits.

    Raises:
        FailedPrecondition: it cannot be opened.
    """
    try:
        flags = os.O_RDWR if path.is_fifo() else os.O_WRONLY | os.O_APPEND
        return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except OSError as error:
        raise FailedPrecondition(
            f"{field} '{path}' cannot be opened: {error.strerror}", field=field
        ) from error
