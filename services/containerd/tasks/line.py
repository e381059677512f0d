"""The line to a process that is a shim at times: it is asked on it, and answers.

    process ──{"waiting": …}──▶ containerd     it waits, and listens; containerd connects to it
            ◀──the request──
            ──who it is──▶                     it serves; or {"error": …}, and it ends
            ──{"waiting": …}──▶                its container is deleted: it can be another's shim;
                                               or {"ends": what was left over}

The request and the first call go out one after the other, on the line and on that connection: the
call waits at the other end until the process is the shim that it is meant for. What became of the
request is asked of the line when the call fails (:meth:`ShimLine.serves`).

A process answers before it takes a call: one that has ended without an answer has done nothing.

A process that waits again has the pid and the start time that it had as a shim, and by these alone
it could be taken for the shim of the former container: for one that lives, or is to be killed. So
nobody can ask it to be another's before the former one is forgotten: its bundle, whose shim.json
names the process, is off the disk, and what containerd knows of it is dropped: ``ShimManager`` has
its removal end with :meth:`ShimLine.release`. Should containerd end before that, the line ends with
it, and the process, which waits, ends too: the next containerd finds a bundle whose process has
ended or is about to, and is nobody else's.
"""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Protocol

import structlog

from services.common.errors import DeadlineExceeded, Internal, TheseusError, Unavailable
from services.containerd.tasks.processes import ProcessId
from services.containerd.tasks.shim import ShimAddress

if TYPE_CHECKING:
    import socket
    from pathlib import Path

    from services.containerd.tasks.shim import ShimRequest

log = structlog.get_logger(__name__)

REPLY_MAX_BYTES = 65536
_LOG_TAIL_BYTES = 2000


class ShimStartFailed(Internal):
    """A shim did not come up; the message has its own words."""


class Way(Protocol):
    """A connection to a shim for calls."""

    def close(self) -> None:
        """Close it; calls under way fail with Unavailable. Idempotent."""


class Pool(Protocol):
    """Where lines come from, and go back to."""

    def gone(self, line: ShimLine) -> None:
        """A line has ended."""

    def take_back(self, line: ShimLine, connection: socket.socket) -> None:
        """The process of a line waits again, and is nobody's; the line is of no more use."""


class ShimLine:
    """One line, while its process waits and for one container after that. Release or close it.

    Args:
        connection: to the process, which has said that it waits; the line's to close.
        process: who it is.
        version: of its program.
        pool: is told of its end, and gets it back.

    Attributes:
        way: the connection for calls; None: one is made as ever.
    """

    def __init__(
        self, connection: socket.socket, process: ProcessId, version: str, pool: Pool
    ) -> None:
        self.process = process
        self.version = version
        self.way: Way | None = None
        self._connection = connection
        self._pool = pool
        self._has_ended = False
        self._request: ShimRequest | None = None
        self._limit: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()
        self._outcome: asyncio.Future[bool | TheseusError] = self._loop.create_future()
        self._back: asyncio.Future[bool] = self._loop.create_future()
        self._loop.add_reader(connection.fileno(), self._read)

    @classmethod
    def of_waiting(cls, connection: socket.socket, said: bytes, pool: Pool) -> ShimLine:
        """The line to a process that has said for the first time that it waits.

        Raises:
            ValueError, KeyError, TypeError: it did not say that.
        """
        who = json.loads(said)
        process = ProcessId(int(who["waiting"]), int(who["start_time"]))
        return cls(connection, process, str(who["version"]), pool)

    @classmethod
    def of_shim(cls, connection: socket.socket, shim: ShimAddress, pool: Pool) -> ShimLine:
        """The line to a process that was asked to be a shim at once, and serves."""
        line = cls(connection, shim.process, shim.version, pool)
        line._settle(True)
        return line

    def ask(self, message: bytes, request: ShimRequest, *, limit_s: float) -> None:
        """Have it be a shim, which it has to be within a time limit.

        Raises:
            ConnectionError: it is gone.
        """
        if self._has_ended:
            raise ConnectionResetError("it has ended")
        try:
            self._connection.send(message)
        except BlockingIOError as error:  # nobody reads there
            raise ConnectionAbortedError("it does not read") from error
        self._request = request
        self._limit = self._loop.call_later(limit_s, self._expire, limit_s)

    async def serves(self) -> bool:
        """Whether it is the shim that it was asked to be, once that is known.

        Returns:
            False if it ended without an answer: another one may be asked.

        Raises:
            ShimStartFailed: it could not.
            DeadlineExceeded: it did not answer in time.
            Unavailable: its answer makes no sense.
        """
        outcome = await asyncio.shield(self._outcome)
        if isinstance(outcome, TheseusError):
            raise outcome
        return outcome

    async def waits_again(self) -> bool:
        """Whether the process is done with its container and waits, once that is known.

        Returns:
            False if the line has ended: the process has too, or ends by itself one day.
        """
        return await asyncio.shield(self._back)

    def release(self) -> None:
        """Give the process back, if it waits; nothing names it any more. It ends if it does not."""
        if self._has_ended or not (self._back.done() and self._back.result()):
            self.close()
            return
        self._loop.remove_reader(self._connection.fileno())
        self._has_ended = True
        self._pool.take_back(self, self._connection)

    def close(self) -> None:
        """Hear of it no more; a process that waits ends. Idempotent."""
        if self._has_ended:
            return
        self._has_ended = True
        self._loop.remove_reader(self._connection.fileno())
        self._connection.close()
        self._settle(False)
        if not self._back.done():
            self._back.set_result(False)
        self._pool.gone(self)

    def _read(self) -> None:
        try:
            data = self._connection.recv(REPLY_MAX_BYTES)
        except BlockingIOError:
            return
        except ConnectionError:  # with something in it that was not read
            data = b""
        if not data:
            self.close()
        elif self._outcome.done():
            if not self._back.done():
                self._back.set_result(self._read_farewell(data))
        elif self._request is not None:
            try:
                read_answer(data, self._request)
            except TheseusError as error:
                self._settle(error)
            else:
                self._settle(True)

    def _read_farewell(self, data: bytes) -> bool:
        """What it says after its container: that it waits, or why it ends."""
        try:
            said = json.loads(data)
            if "waiting" in said:
                return True
        except (ValueError, TypeError):
            said = data
        log.info("process of a shim is not used again", pid=self.process.pid, said=said)
        return False

    def _expire(self, limit_s: float) -> None:
        assert self._request is not None, "it was asked"
        self._settle(not_in_time(self._request, limit_s))

    def _settle(self, outcome: bool | TheseusError) -> None:
        if self._limit is not None:
            self._limit.cancel()
            self._limit = None
        if self._outcome.done():
            return
        self._outcome.set_result(outcome)
        if outcome is not True and self.way is not None:
            self.way.close()  # a call on it would wait for ever


def read_answer(answer: bytes, request: ShimRequest) -> ShimAddress:
    """Where a shim serves, out of its answer.

    Raises:
        ShimStartFailed: it could not.
        Unavailable: it makes no sense.
    """
    try:
        data = json.loads(answer)
        if error := data.get("error"):
            raise ShimStartFailed(f"the shim of '{request.id}' did not start: {error}")
        return ShimAddress(
            ProcessId(int(data["pid"]), int(data["start_time"])),
            str(data["address"]),
            str(data["version"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Unavailable("the shim factory's reply makes no sense: is it another version?") from (
            error
        )


def ended_early(request: ShimRequest) -> ShimStartFailed:
    """What to say of a shim that has ended without an answer. Blocks."""
    return ShimStartFailed(
        f"the shim of '{request.id}' ended before it served: {_log_tail(request.bundle)}"
    )


def not_in_time(request: ShimRequest, limit_s: float) -> DeadlineExceeded:
    """What to say of a shim that does not answer."""
    return DeadlineExceeded(
        f"no shim for '{request.id}' within {limit_s:g} s: see {request.bundle}/shim.log "
        "and the log of the shim factory"
    )


def _log_tail(bundle: Path) -> str:
    try:
        text = (bundle / "shim.log").read_bytes()[-_LOG_TAIL_BYTES:].decode(errors="replace")
    except FileNotFoundError:
        return "it left no log"
    return " | ".join(text.split("\n")[-4:]).strip(" |") or "its log is empty"
