"""Setting records right after containerd, or this daemon, was away.

What runs is containerd's to know. For every container recorded as live its task is asked for:

    runs            recorded so, a start that was cut off included
    paused          likewise
    has stopped     its exit status is recorded
    never started   the start is given up
    unknown         the status is lost, and the record says why; nothing is made up
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from typing import TYPE_CHECKING

import structlog

from services.common.errors import DeadlineExceeded, NotFound, TheseusError, Unavailable
from services.daemon.containers import outcome
from services.daemon.containers.record import ContainerRecord, ExitStatus, State
from services.daemon.containers.runtime import TaskProcess, TaskStatus
from services.daemon.containers.states import Action, after

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from services.common.background import Background
    from services.common.database import Transaction
    from services.daemon.containers.below import Below
    from services.daemon.containers.caretaker import Caretaker
    from services.daemon.containers.cleanup import Cleaner
    from services.daemon.containers.record import ContainerId, ExecRecord

log = structlog.get_logger(__name__)

_AT_ONCE = 16
_WAIT_S = 5.0
_PAUSE_S = 1.0
_UNKNOWN_TASK = "containerd knows no task of this container any more: how it ended cannot be known"


class Reconciler:
    """Asks containerd about containers.

    Args:
        below: what containers are made of.
        cleaner: undoes starts that were given up.
        caretaker: looks after containers that are found to have ended.
        background: owns what is asked again.
    """

    def __init__(
        self, below: Below, *, cleaner: Cleaner, caretaker: Caretaker, background: Background
    ) -> None:
        self._below = below
        self._cleaner = cleaner
        self._caretaker = caretaker
        self._background = background
        self._catch_up: Callable[[], Awaitable[None]] | None = None

    def use(self, catch_up: Callable[[], Awaitable[None]]) -> None:
        """Set what deals with all events that containerd has journaled so far."""
        self._catch_up = catch_up

    async def all_live(self) -> None:
        """Ask about every container that is recorded as live.

        Raises:
            Unavailable: containerd went away; what was found so far is recorded.
        """
        limit = asyncio.Semaphore(_AT_ONCE)

        async def one(record: ContainerRecord) -> None:
            async with limit:
                await self._one(record)

        live = [record for record in self._below.store.list_all() if record.live]
        there = await self._below.tasks.all() if live else {}
        # What ends after this answer has an event after those that were read.
        records = [record for record in live if not _agree(record, there.get(record.id))]
        results = await asyncio.gather(*(one(r) for r in records), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result

    def settle_soon(self, container_id: ContainerId) -> None:
        """Find out about a start that was cut off, as soon as containerd answers."""
        self._background.start(self._settle_later(container_id), name=f"settle-{container_id[:12]}")

    async def settle_start(self, record: ContainerRecord) -> ContainerRecord:
        """Find out about a start that was cut off; the caller holds the operation lock.

        Raises:
            Unavailable: containerd does not answer; nothing was changed.
        """
        try:
            process = await self._below.tasks.get(record.id)
        except NotFound:
            process = None
        if process is None or process.status is TaskStatus.CREATED:
            await self._below.store.change(record.id, outcome.abandoned)
            await self._cleaner.clean(record.id)
            log.info("start given up", container_id=record.id)
        else:
            await self._record(record, process)
        settled = self._below.store.require(record.id)
        self._caretaker.tend(record.id)
        return settled

    async def _settle_later(self, container_id: ContainerId) -> None:
        while True:
            try:
                async with self._below.locks.hold(container_id):
                    record = self._below.store.get(container_id)
                    if record is not None and record.state is State.STARTING:
                        await self.settle_start(record)
                return
            except (Unavailable, DeadlineExceeded):
                log.debug("start not settled yet", container_id=container_id)
            except TheseusError as error:
                log.warning("start not settled", container_id=container_id, error=error.message)
            await asyncio.sleep(_PAUSE_S)

    async def _one(self, record: ContainerRecord) -> None:
        try:
            if record.state is State.STARTING:
                self.settle_soon(record.id)
                return
            await self._running(record)
        except DeadlineExceeded:
            # Its shim has not come back yet; others need not wait for it.
            self._background.start(self._ask_again(record), name=f"ask-{record.id[:12]}")

    async def _ask_again(self, record: ContainerRecord) -> None:
        while True:
            await asyncio.sleep(_PAUSE_S)
            try:
                await self._running(record)
                return
            except DeadlineExceeded:
                continue
            except Unavailable:
                return  # the next connection asks about everyone

    async def _running(self, record: ContainerRecord) -> None:
        try:
            process = await self._below.tasks.get(record.id)
        except NotFound:
            await self._lost(record, _UNKNOWN_TASK)
            return
        await self._record(record, process)

    async def _record(self, record: ContainerRecord, process: TaskProcess) -> None:
        match process.status:
            case TaskStatus.STOPPED:
                status = ExitStatus(process.exit_code, process.exited_at_ns or time.time_ns())
                await self._ended(record, status)
            case TaskStatus.UNKNOWN:
                await self._ask_why(record)
            case _:
                now_ns = time.time_ns()

                def correct(present: ContainerRecord) -> ContainerRecord | None:
                    return _correct(present, record.runs, process, now_ns)

                await self._below.store.change(record.id, correct)

    async def _ask_why(self, record: ContainerRecord) -> None:
        try:
            await self._below.tasks.wait_end(record.id, timeout_s=_WAIT_S)
        except (Unavailable, DeadlineExceeded):
            raise
        except TheseusError as error:
            await self._lost(record, error.message)

    async def _lost(self, record: ContainerRecord, reason: str) -> None:
        """Record that nobody knows how it ended, unless the journal does."""
        if self._catch_up is not None:
            await self._catch_up()
        present = self._below.store.get(record.id)
        if present is None or not present.live or present.runs != record.runs:
            return
        log.warning("exit status lost", container_id=record.id, reason=reason)
        await self._ended(record, outcome.lost(reason, time.time_ns()))

    async def _ended(self, record: ContainerRecord, status: ExitStatus) -> None:
        def end(present: ContainerRecord) -> ContainerRecord | None:
            return outcome.ended(present, status) if present.runs == record.runs else None

        ended_execs: list[ExecRecord] = []

        def end_execs(tx: Transaction) -> None:
            gone = outcome.lost(outcome.ENDED_WITH_CONTAINER, status.finished_at_ns)
            ended_execs.extend(self._below.execs.end_all_in(tx, record.id, gone))

        changed = await self._below.store.change(record.id, end, also=end_execs)
        for exec_record in ended_execs:
            self._below.execs.publish(exec_record)
        if not changed.live and changed.exits > record.exits and changed.exit is not None:
            self._below.observer.ended(changed.exit)
            log.info(
                "container found ended",
                container_id=record.id,
                exit_code=changed.exit.code,
                lost=changed.exit.lost,
            )
        self._caretaker.tend(record.id)


def _agree(record: ContainerRecord, process: TaskProcess | None) -> bool:
    """Whether a record says of its task what containerd says: nothing is to be asked then."""
    match record.state, process and process.status:
        case (State.RUNNING, TaskStatus.RUNNING) | (State.PAUSED, TaskStatus.PAUSED):
            return True
    return False


def _correct(
    present: ContainerRecord, runs: int, process: TaskProcess, now_ns: int
) -> ContainerRecord | None:
    """The record in line with a task that exists."""
    if present.runs != runs or not present.live:
        return None
    if present.state is State.STARTING:
        return outcome.running(present, pid=process.pid, started_at_ns=now_ns)
    if process.status is TaskStatus.PAUSED and present.state is State.RUNNING:
        return dataclasses.replace(present, state=after(present, Action.PAUSE))
    if process.status is TaskStatus.RUNNING and present.state is State.PAUSED:
        return dataclasses.replace(present, state=after(present, Action.RESUME))
    return None
