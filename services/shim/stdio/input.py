"""Standard input of a process: written to its pipe or terminal, from a FIFO or by attached clients.

Bytes of attached clients carry their offset in the whole input, so that a piece that is sent again
after a reconnect is taken once.
"""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any, Self

from services.common.errors import FailedPrecondition, OutOfRange
from services.shim.futures import finish
from services.shim.handover import data_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from services.shim.handover import Outgoing

_READ_BYTES = 65536


class Input:
    """The writing end of a process' standard input, non-blocking.

    Args:
        fd: pipe or terminal master.
        terminal: a terminal's input has no end, and ``fd`` is closed by its owner.
        close: closes it.
        took: called with the number of all bytes that the process was given.
    """

    def __init__(
        self,
        fd: int,
        *,
        terminal: bool,
        close: Callable[[int], None] = os.close,
        took: Callable[[int], None] = lambda _count: None,
    ) -> None:
        self.taken = 0
        self._close_fd = close
        self._took = took
        self._fd = fd
        self._terminal = terminal
        self._broken = False
        self._writer: object | None = None
        self._writable: asyncio.Future[None] | None = None
        self._lock = asyncio.Lock()
        self._loop = asyncio.get_running_loop()

    def pack(self, out: Outgoing) -> dict[str, Any]:
        """What the next image of the shim goes on with."""
        return {
            "fd": out.fd(self._fd),
            "terminal": self._terminal,
            "taken": self.taken,
            "broken": self._broken,
        }

    @classmethod
    def unpack(
        cls,
        saved: Mapping[str, Any],
        *,
        close: Callable[[int], None],
        took: Callable[[int], None],
    ) -> Self:
        """The input that was packed."""
        source = cls(saved["fd"], terminal=saved["terminal"], close=close, took=took)
        source.taken = saved["taken"]
        source._broken = saved["broken"]
        return source

    def take_over(self, writer: object) -> None:
        """Make ``writer`` the one whose input counts."""
        self._writer = writer

    async def write_at(self, writer: object, offset: int, data: bytes) -> None:
        """Write the part of ``data`` that was not taken yet; waits for the process to take it.

        Raises:
            OutOfRange: bytes before ``offset`` are missing.
            FailedPrecondition: somebody else took over.
        """
        async with self._lock:
            if writer is not self._writer:
                raise FailedPrecondition("another client took over standard input")
            if offset > self.taken:
                raise OutOfRange(
                    f"input begins at offset {offset}, and only {self.taken} bytes came before it"
                )
            await self._write(data[self.taken - offset :])

    async def write(self, data: bytes) -> None:
        """Write; waits for the process to take it. What it cannot take any more is dropped."""
        async with self._lock:
            await self._write(data)

    async def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            if self._broken or self._fd < 0:
                self.taken += len(view)
                return
            try:
                written = os.write(self._fd, view)
            except BlockingIOError:
                await self._wait_writable()
                continue
            except OSError:  # nobody reads it any more
                self._broken = True
                continue
            self.taken += written
            self._took(self.taken)
            view = view[written:]

    def end(self) -> None:
        """Let the process read end of file; nothing happens on a terminal."""
        if not self._terminal:
            self.close()

    def close(self) -> None:
        """Write no more."""
        if self._fd >= 0:
            self._loop.remove_writer(self._fd)
            if not self._terminal:
                self._close_fd(self._fd)
            self._fd = -1
            self._wake()

    async def _wait_writable(self) -> None:
        self._writable = self._loop.create_future()
        self._loop.add_writer(self._fd, self._wake)
        try:
            await self._writable
        finally:
            if self._fd >= 0:
                self._loop.remove_writer(self._fd)

    def _wake(self) -> None:
        if self._writable is not None:
            finish(self._writable, None)


class FifoInput:
    """Copies a FIFO that a client writes to into an :class:`Input`.

    The shim holds the FIFO open for writing too, so that a client may leave and come back; CloseIO
    ends that, and the process then reads end of file once the last client is gone.
    """

    def __init__(
        self,
        target: Input,
        *,
        fd: int,
        writer_fd: int,
        untaken: bytes = b"",
        close: Callable[[int], None] = os.close,
    ) -> None:
        self._target = target
        self._close = close
        self._fd = fd
        self._writer_fd = writer_fd
        # Read, and not yet taken from here on, where the input was `_untaken_at` bytes long.
        self._untaken = untaken
        self._untaken_at = target.taken
        self._loop = asyncio.get_running_loop()

    @classmethod
    def open(cls, path: Path, target: Input, *, close: Callable[[int], None] = os.close) -> Self:
        """Open a FIFO, or a file.

        Raises:
            FailedPrecondition: it cannot be opened.
        """
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise FailedPrecondition(
                f"stdin '{path}' cannot be opened: {error.strerror}", field="stdin"
            ) from error
        writer_fd = -1
        if path.is_fifo():
            writer_fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        return cls(target, fd=fd, writer_fd=writer_fd, close=close)

    def pack(self, out: Outgoing) -> dict[str, Any] | None:
        """What the next image of the shim goes on with; None when the end of file was read."""
        if self._fd < 0:
            return None
        return {
            "fd": out.fd(self._fd),
            "writer_fd": out.fd(self._writer_fd),
            "untaken": out.data(self._untaken[self._target.taken - self._untaken_at :]),
        }

    @classmethod
    def unpack(
        cls, saved: Mapping[str, Any], target: Input, *, close: Callable[[int], None]
    ) -> Self:
        """The copying that was packed."""
        return cls(
            target,
            fd=saved["fd"],
            writer_fd=saved["writer_fd"],
            untaken=data_of(saved["untaken"]),
            close=close,
        )

    async def copy(self) -> None:
        """Copy until the end of file; runs as a task of its own."""
        try:
            if self._untaken:
                await self._target.write(self._untaken)
            while True:
                try:
                    data = os.read(self._fd, _READ_BYTES)
                except BlockingIOError:
                    await self._wait_readable()
                    continue
                if not data:
                    break
                self._untaken, self._untaken_at = data, self._target.taken
                await self._target.write(data)
        finally:
            self._close(self._fd)
            self._fd = -1
            self.release()
        self._target.end()

    def release(self) -> None:
        """Hold the FIFO open for writing no more."""
        if self._writer_fd >= 0:
            self._close(self._writer_fd)
            self._writer_fd = -1

    async def _wait_readable(self) -> None:
        readable: asyncio.Future[None] = self._loop.create_future()
        self._loop.add_reader(self._fd, finish, readable, None)
        try:
            await readable
        finally:
            self._loop.remove_reader(self._fd)
