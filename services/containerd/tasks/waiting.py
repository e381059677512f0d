"""Shims that wait ready: half of the time in which a shim comes up is over before it is wanted.

The factory answers a request to wait with a process whose server listens already; that waits on the
connection for the real request, and ends when the connection is closed. Their number is bounded,
since each has some megabytes. One that was taken is replaced a little later, not while its
container is being made.
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

if TYPE_CHECKING:
    from pathlib import Path

log = structlog.get_logger(__name__)

_REPLACE_AFTER_S = 0.05
_AGAIN_S = 0.2
_ANSWER_S = 10.0
_REPLY_MAX_BYTES = 65536
_NAME = "waiting-"


class WaitingShims:
    """Keeps a number of shims ready.

    Args:
        factory: where the shim factory listens.
        places: directory of their sockets, on the file system of those of shims.
        number: how many; 0 for none.
    """

    def __init__(self, *, factory: Path, places: Path, number: int) -> None:
        self._factory = factory
        self._places = places
        self._number = number
        self._ready: deque[tuple[socket.socket, int]] = deque()
        self._taken = asyncio.Event()

    def __len__(self) -> int:
        return len(self._ready)

    def take(self) -> socket.socket | None:
        """The connection to one that lives, the caller's to close; None where none is ready."""
        while self._ready:
            connection, pid = self._ready.popleft()
            self._taken.set()
            try:
                connection.recv(1, socket.MSG_PEEK)
            except BlockingIOError:  # it waits
                return connection
            except OSError as error:
                log.info("waiting shim is gone", pid=pid, error=error.strerror)
            connection.close()
        return None

    async def run(self) -> None:
        """Fill up, now and whenever one was taken; closes all of them when it is cancelled."""
        if not self._number:
            return
        await asyncio.to_thread(self._clear)
        try:
            while True:
                self._taken.clear()
                while len(self._ready) < self._number and await self._add():
                    pass
                full = len(self._ready) >= self._number
                with suppress(TimeoutError):
                    async with asyncio.timeout(None if full else _AGAIN_S):
                        await self._taken.wait()
                await asyncio.sleep(_REPLACE_AFTER_S)
        finally:
            while self._ready:
                self._ready.popleft()[0].close()

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
                reply = await loop.sock_recv(connection, _REPLY_MAX_BYTES)
            answer = json.loads(reply) if reply else {}
            if isinstance(answer, dict) and "waiting" in answer:
                self._ready.append((connection, int(answer["waiting"])))
                return True
            log.warning("no shim waits ready", answer=answer)
        except (OSError, TimeoutError, ValueError, TypeError) as error:  # no factory at this moment
            log.debug("no shim waits ready", error=str(error))
        except BaseException:
            connection.close()
            raise
        connection.close()
        return False

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
