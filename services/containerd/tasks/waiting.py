"""Shims that wait ready: most of the time in which a shim comes up is over before it is wanted.

The factory answers a request to wait with a process whose server listens already; that waits on the
connection (:mod:`.line`) for the real request, and ends when the connection is closed. Their number
is bounded, since each has some megabytes. One that was taken is replaced a little later, not while
its container is being made; and not at once where others are left, since most containers of which
there are many live for a short time, and their shims come back. Some more than the number may wait
for a moment then.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING

import structlog

from services.common.background import Background
from services.containerd.tasks.line import REPLY_MAX_BYTES, ShimLine, Way

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from services.containerd.tasks.shim import ShimAddress

    Dial = Callable[[Path], Awaitable[Way]]
    """Connects to a shim for calls; raises OSError if nobody listens there."""

log = structlog.get_logger(__name__)

_REPLACE_AFTER_S = 0.05
_BACK_WITHIN_S = 1.0
_MORE_FOR_A_MOMENT = 8
_AGAIN_S = 0.2
_ANSWER_S = 10.0
_NAME = "waiting-"


class WaitingShims:
    """Keeps a number of shims ready.

    Args:
        factory: where the shim factory listens.
        places: directory of their sockets, on the file system of those of shims.
        number: how many; 0 for none.
        dial: connects to one ahead of its first call; None: nobody does.
    """

    def __init__(
        self, *, factory: Path, places: Path, number: int, dial: Dial | None = None
    ) -> None:
        self._dial = dial
        self._factory = factory
        self._places = places
        self._number = number
        # Those that were shims before are on the right, and taken first: their pages are theirs.
        self._ready: deque[ShimLine] = deque()
        self._lines: set[ShimLine] = set()
        self._background = Background()
        self._changed = asyncio.Event()
        self._open = False

    def __len__(self) -> int:
        return len(self._ready)

    def take(self) -> ShimLine | None:
        """The line to one, the caller's to close; None where none is ready."""
        if not self._ready:
            return None
        self._changed.set()
        return self._ready.pop()

    @property
    def place(self) -> Path | None:
        """Where a shim that was asked for at once may wait after its container; None: nowhere."""
        return self._places if self._open else None

    def remember(self, connection: socket.socket, shim: ShimAddress) -> ShimLine:
        """The line to a shim that was asked for at once; the connection is the line's."""
        line = ShimLine.of_shim(connection, shim, self)
        self._lines.add(line)
        return line

    def gone(self, line: ShimLine) -> None:
        """As ``Pool.gone``; if nobody has taken it, it was killed."""
        self._lines.discard(line)
        with suppress(ValueError):
            self._ready.remove(line)
            log.info("waiting shim is gone", pid=line.process.pid)
            self._changed.set()

    def take_back(self, line: ShimLine, connection: socket.socket) -> None:
        """As ``Pool.take_back``."""
        self._lines.discard(line)
        if not self._open or len(self._ready) >= self._number + _MORE_FOR_A_MOMENT:
            connection.close()
            return
        again = ShimLine(connection, line.process, line.version, self)
        self._lines.add(again)
        self._background.start(self._welcome_back(again), name="welcome of a shim that waits")

    async def run(self) -> None:
        """Keep the number, now and whenever it has changed; closes all lines when it is cancelled.

        A process that is a shim at that moment goes on, and ends when its container is deleted.
        """
        if not self._number:
            return
        await asyncio.to_thread(self._clear)
        self._open = True
        try:
            while True:
                self._changed.clear()
                while len(self._ready) > self._number:
                    self._ready.popleft().close()
                while len(self._ready) < self._number and await self._add():
                    pass
                full = len(self._ready) >= self._number
                with suppress(TimeoutError):
                    async with asyncio.timeout(None if full else _AGAIN_S):
                        await self._changed.wait()
                await self._settled()
        finally:
            self._open = False
            await self._background.stop()
            self._ready.clear()
            for line in list(self._lines):
                line.close()

    async def _settled(self) -> None:
        """Return once nothing has changed for a while, a short one if none is ready."""
        with suppress(TimeoutError):
            while True:
                self._changed.clear()
                async with asyncio.timeout(_BACK_WITHIN_S if self._ready else _REPLACE_AFTER_S):
                    await self._changed.wait()

    async def _add(self) -> bool:
        """Have the factory make one; returns whether it did."""
        loop = asyncio.get_running_loop()
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            connection.setblocking(False)
            connection.connect(str(self._factory))
            async with asyncio.timeout(_ANSWER_S):
                request = json.dumps({"wait_in": str(self._places)}).encode()
                await loop.sock_sendall(connection, request)
                reply = await loop.sock_recv(connection, REPLY_MAX_BYTES)
                if reply:
                    line = ShimLine.of_waiting(connection, reply, self)
                    self._lines.add(line)
                    if await self._welcome(line):
                        self._ready.appendleft(line)
                        self._changed.set()
                    return True
        except (ValueError, KeyError, TypeError) as error:
            log.warning("no shim waits ready", answer=reply, error=str(error))
        except (OSError, TimeoutError) as error:  # no factory at this moment
            log.debug("no shim waits ready", error=str(error))
        except BaseException:
            connection.close()
            raise
        connection.close()
        return False

    async def _welcome(self, line: ShimLine) -> bool:
        """Connect to one that waits; returns whether it still does, raises OSError if not."""
        if self._dial is not None:
            try:
                line.way = await self._dial(self._places / f"{_NAME}{line.process.pid}")
            except BaseException:
                line.close()
                raise
        if line in self._lines:
            return True
        if line.way is not None:  # it was killed meanwhile
            line.way.close()
        return False

    async def _welcome_back(self, line: ShimLine) -> None:
        try:
            if await self._welcome(line):
                self._ready.append(line)
                self._changed.set()
        except OSError as error:
            log.info("waiting shim is gone", pid=line.process.pid, error=error.strerror)

    def _clear(self) -> None:
        """Make the directory, and remove sockets of waiting shims that were killed. Blocks."""
        self._places.mkdir(mode=0o711, parents=True, exist_ok=True)
        for path in self._places.glob(f"{_NAME}*"):
            pid = path.name.removeprefix(_NAME)
            try:
                os.kill(int(pid), 0)
            except (ProcessLookupError, ValueError):
                path.unlink(missing_ok=True)
            except PermissionError:
                continue
