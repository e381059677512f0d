"""One process of a container: its state machine, its end, and those who wait for it.

What may be done in which state is two tables, one for init and one for exec processes. The tables
are the only place that decides; :class:`Process` consults them before an action and moves on after.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from dataclasses import field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Self

from services.common import linux
from services.common.errors import DataLoss, FailedPrecondition, InvalidArgument, NotFound
from services.common.frozen import frozen, plain
from services.shim.stdio.uris import Stdio

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from services.shim.reaper import Exit
    from services.shim.stdio.process_io import ProcessIo


PROCESS_STATE = "PROCESS_STATE"
"""Reason of the error for what a process' state does not allow."""


class Status(StrEnum):
    """States of the OCI runtime-spec, ``paused`` and ``deleted`` added."""

    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    STOPPED = "stopped"
    DELETED = "deleted"


class Action(StrEnum):
    """What is done to a process, or happens to it."""

    START = "start"
    PAUSE = "pause"
    RESUME = "resume"
    UPDATE = "update"
    CHECKPOINT = "checkpoint"
    EXEC = "exec in"
    KILL = "kill"
    RESIZE = "resize"
    DELETE = "delete"
    EXIT = "exit"


Transitions = dict[tuple[Status, Action], Status]

INIT_TRANSITIONS: Transitions = {
    (Status.CREATED, Action.START): Status.RUNNING,
    (Status.CREATED, Action.UPDATE): Status.CREATED,
    (Status.CREATED, Action.EXEC): Status.CREATED,
    (Status.CREATED, Action.KILL): Status.CREATED,
    (Status.CREATED, Action.RESIZE): Status.CREATED,
    (Status.CREATED, Action.DELETE): Status.DELETED,
    (Status.CREATED, Action.EXIT): Status.STOPPED,
    (Status.RUNNING, Action.PAUSE): Status.PAUSED,
    (Status.RUNNING, Action.UPDATE): Status.RUNNING,
    (Status.RUNNING, Action.CHECKPOINT): Status.RUNNING,
    (Status.RUNNING, Action.EXEC): Status.RUNNING,
    (Status.RUNNING, Action.KILL): Status.RUNNING,
    (Status.RUNNING, Action.RESIZE): Status.RUNNING,
    (Status.RUNNING, Action.EXIT): Status.STOPPED,
    (Status.PAUSED, Action.RESUME): Status.RUNNING,
    (Status.PAUSED, Action.UPDATE): Status.PAUSED,
    (Status.PAUSED, Action.CHECKPOINT): Status.PAUSED,
    (Status.PAUSED, Action.KILL): Status.PAUSED,
    (Status.PAUSED, Action.RESIZE): Status.PAUSED,
    (Status.PAUSED, Action.EXIT): Status.STOPPED,
    (Status.STOPPED, Action.DELETE): Status.DELETED,
}
EXEC_TRANSITIONS: Transitions = {
    (Status.CREATED, Action.START): Status.RUNNING,
    (Status.CREATED, Action.RESIZE): Status.CREATED,
    (Status.CREATED, Action.DELETE): Status.DELETED,
    (Status.RUNNING, Action.KILL): Status.RUNNING,
    (Status.RUNNING, Action.RESIZE): Status.RUNNING,
    (Status.RUNNING, Action.EXIT): Status.STOPPED,
    (Status.STOPPED, Action.DELETE): Status.DELETED,
}


@frozen
class ExitRecord:
    """How a process ended.

    Attributes:
        status: exit code, or 128 and the signal.
        exited_at_ns: nanoseconds since the epoch.
        signal: the signal that ended it, or 0.
        oom_killed: whether the kernel killed something in the cgroup for lack of memory.
        usage: user and system time in microseconds, largest resident set in bytes; empty where
            nobody was told.
        lost: why nobody can know how it ended, which makes the status mean nothing; or empty.
    """

    status: int
    exited_at_ns: int
    signal: int = 0
    oom_killed: bool = False
    usage: Mapping[str, int] = field(default_factory=dict)
    lost: str = ""

    @classmethod
    def unpack(cls, saved: Mapping[str, Any]) -> Self:
        """The record that ``plain`` made plain data of."""
        return cls(
            status=saved["status"],
            exited_at_ns=saved["exited_at_ns"],
            signal=saved["signal"],
            oom_killed=saved["oom_killed"],
            usage=saved["usage"],
            lost=saved["lost"],
        )

    @classmethod
    def of(cls, ended: Exit, *, oom_killed: bool) -> ExitRecord:
        """The record of an exit that was reaped."""
        return cls(
            status=ended.code,
            exited_at_ns=ended.exited_at_ns,
            signal=ended.signal,
            oom_killed=oom_killed,
            usage={
                "user_us": ended.user_us,
                "system_us": ended.system_us,
                "max_rss_bytes": ended.max_rss_bytes,
            }
            if ended.reaped
            else {},
            lost=ended.lost,
        )


class Process:
    """An init (``exec_id`` empty) or an exec process.

    ``lock`` is held by whoever changes the state with an await in between: start, pause, resume,
    delete, and the handling of its exit, which thereby waits for a start under way.

    Attributes:
        kept: what the keeper holds for a successor, as names; None before it was created.
        orphan: it is not a child of this shim, but of an earlier one that died.
        pidfd: open while it runs; closed by ``release``.
    """

    def __init__(
        self,
        container_id: str,
        exec_id: str,
        stdio: Stdio,
        *,
        release: Callable[[int], None] = os.close,
    ) -> None:
        self.kept: dict[str, Any] | None = None
        self.orphan = False
        self.pidfd = -1
        self._release = release
        self.container_id = container_id
        self.exec_id = exec_id
        self.stdio = stdio
        self.status = Status.CREATED
        self.pid = 0
        self.start_time = 0
        self.io: ProcessIo | None = None
        self.exit: ExitRecord | None = None
        self.lock = asyncio.Lock()
        self._transitions = EXEC_TRANSITIONS if exec_id else INIT_TRANSITIONS
        self._ended = asyncio.Event()
        self._attempted = asyncio.Event()

    @property
    def id(self) -> str:
        """Its id in events: the exec id, or the container's."""
        return self.exec_id or self.container_id

    def check(self, action: Action) -> Status:
        """The state that ``action`` leads to.

        Raises:
            NotFound: it is to be killed and has ended (upstream's code and words).
            FailedPrecondition: the action is not allowed in this state.
        """
        following = self._transitions.get((self.status, action))
        if following is not None:
            return following
        what = f"process '{self.exec_id}'" if self.exec_id else f"container '{self.container_id}'"
        if self.status is Status.DELETED or (
            action is Action.KILL and self.status is Status.STOPPED
        ):
            raise NotFound(f"process already finished: {what} is {self.status}")
        raise FailedPrecondition(
            f"cannot {action} {what}: it is {self.status}", reason=PROCESS_STATE
        )

    def apply(self, action: Action) -> None:
        """Move to the state that ``action`` leads to.

        Raises:
            FailedPrecondition: the action is not allowed in this state.
        """
        self.status = self.check(action)

    def created(self, pid: int) -> None:
        """Take the process that the runtime made; it is our child, so the pid is still its own."""
        self.pid = pid
        self.start_time = linux.process_start_time(pid) or 0
        # Gone already: its end is in the reaper's window.
        with contextlib.suppress(ProcessLookupError):
            self.pidfd = os.pidfd_open(pid)

    def send_signal(self, signum: int) -> None:
        """Signal the process itself.

        Raises:
            NotFound: it has ended.
            InvalidArgument: there is no such signal.
        """
        if not 0 <= signum < signal.NSIG:
            raise InvalidArgument(f"there is no signal {signum}", field="signal")
        if self.pidfd < 0:
            raise NotFound(f"process already finished: pid {self.pid}")
        try:
            signal.pidfd_send_signal(self.pidfd, signum)
        except ProcessLookupError as error:
            raise NotFound(f"process already finished: pid {self.pid}") from error

    def ended(self, record: ExitRecord) -> None:
        """Note its end; call ``tell`` once the record is safe."""
        self.apply(Action.EXIT)
        self.exit = record
        self._close_pidfd()

    def tell(self) -> None:
        """Wake those who wait for its end."""
        self._ended.set()

    def deleted(self) -> None:
        """Note that it is deleted; who still waits for one that never ran is woken."""
        self.apply(Action.DELETE)
        self._close_pidfd()
        self._ended.set()
        self.attempted()

    def attempted(self) -> None:
        """Note that it was started, or could not be: who waits for its streams looks again."""
        self._attempted.set()
        self._attempted.clear()

    async def streams(self) -> ProcessIo:
        """Its streams. An exec process has none before its start, which is waited for.

        Raises:
            FailedPrecondition: the start failed, or its streams are gone.
        """
        if self.io is None and self.exec_id and self.status is Status.CREATED:
            await self._attempted.wait()
        if self.io is None:
            raise FailedPrecondition(
                f"process '{self.id}' is {self.status} and has no streams to attach to"
            )
        return self.io

    async def close_io(self, *, drain: bool) -> None:
        """Close its streams, if it has any; see ``ProcessIo.close``."""
        if self.io is not None:
            await self.io.close(drain=drain)
            self.io = None

    async def wait(self) -> ExitRecord:
        """How it ended, once it has and that is on the spool.

        Raises:
            NotFound: it was deleted before it ran.
            DataLoss: nobody can know how.
        """
        await self._ended.wait()
        self.check_known()
        if self.exit is None:
            raise NotFound(f"process '{self.id}' was deleted before it was started")
        return self.exit

    def check_known(self) -> None:
        """Raise if it ended and nobody can know how.

        Raises:
            DataLoss: that is so.
        """
        if self.exit is not None and self.exit.lost:
            raise DataLoss(
                f"process '{self.id}' has ended and its exit status is lost: {self.exit.lost}"
            )

    @classmethod
    def unpack(
        cls,
        container_id: str,
        saved: Mapping[str, Any],
        *,
        pidfd: int,
        release: Callable[[int], None],
    ) -> Self:
        """The process that ``state`` described, without its streams."""
        stdio = Stdio(saved["stdin"], saved["stdout"], saved["stderr"], saved["terminal"])
        process = cls(container_id, saved["exec_id"], stdio, release=release)
        process.kept = saved["kept"]
        process.orphan = saved["orphan"]
        process.status = Status(saved["status"])
        process.pid = saved["pid"]
        process.start_time = saved["start_time"]
        if saved["exit"] is not None:
            process.exit = ExitRecord.unpack(saved["exit"])
            process._ended.set()
        process.pidfd = pidfd
        return process

    def state(self) -> dict[str, object]:
        """What a successor of the shim has to know of it; goes into ``state.json``."""
        record = self.exit
        return {
            "exec_id": self.exec_id,
            "pid": self.pid,
            "start_time": self.start_time,
            "orphan": self.orphan,
            "kept": self.kept,
            "status": str(self.status),
            "stdin": self.stdio.stdin,
            "stdout": self.stdio.stdout,
            "stderr": self.stdio.stderr,
            "terminal": self.stdio.terminal,
            "exit_status": record.status if record else None,
            "exited_at_ns": record.exited_at_ns if record else None,
            "exit": plain(record) if record else None,
        }

    def _close_pidfd(self) -> None:
        if self.pidfd >= 0:
            self._release(self.pidfd)
            self.pidfd = -1


def exit_fields(process: Process, record: ExitRecord) -> dict[str, object]:
    """Fields of the event that tells the end of a process."""
    if record.lost:
        return {
            "container_id": process.container_id,
            "exec_id": process.exec_id,
            "pid": process.pid,
            "status": str(Status.STOPPED),
            "exited_at_ns": record.exited_at_ns,
            "exit_status_lost": True,
        }
    return {
        "container_id": process.container_id,
        "id": process.id,
        "pid": process.pid,
        "exit_status": record.status,
        "exited_at_ns": record.exited_at_ns,
        "signal": record.signal,
        "oom_killed": record.oom_killed,
        "usage": dict(record.usage),
    }
