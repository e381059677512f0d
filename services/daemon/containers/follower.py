"""Following containerd's event journal: each event changes our records exactly once.

The sequence number of the last event that was dealt with is written in the transaction that deals
with it. Whatever is cut off, by a crash of ours or of containerd, is read again from there, and
what was read before is passed over inside the transaction.

A round: read what is there · ask about all live containers · follow. It begins again whenever the
connection breaks, for ever.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import structlog

from services.common.errors import OutOfRange, TheseusError
from services.daemon.containers import exec_store, outcome
from services.daemon.containers.record import (
    ContainerId,
    ContainerRecord,
    ExecId,
    ExitStatus,
    State,
)
from services.daemon.containers.runtime import EventKind
from services.daemon.containers.states import Action, after, allows
from services.daemon.metadata import containers as rows

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from services.common.database import Database, Transaction
    from services.daemon.containers.below import Below
    from services.daemon.containers.caretaker import Caretaker
    from services.daemon.containers.reconcile import Reconciler
    from services.daemon.containers.record import ExecRecord
    from services.daemon.containers.runtime import EventJournal, RuntimeEvent

log = structlog.get_logger(__name__)

_BATCH_MAX = 256
_FIRST_PAUSE_S = 0.02
_LONGEST_PAUSE_S = 1.0
_LOST_WORDS = "containerd lost track of it: how it ended cannot be known"


@dataclasses.dataclass(slots=True)
class _Applied:
    """What one transaction changed."""

    containers: list[ContainerRecord]
    ended: list[ContainerRecord]
    execs: list[ExecRecord]


class Follower:
    """Keeps records in step with containerd.

    Args:
        db: has the records and the place in the journal.
        below: what containers are made of.
        journal: containerd's.
        reconciler: asks about containers after a gap.
        caretaker: looks after containers that have ended.
        exec_ended: told of each exec session that ended.
    """

    def __init__(
        self,
        db: Database,
        below: Below,
        *,
        journal: EventJournal,
        reconciler: Reconciler,
        caretaker: Caretaker,
        exec_ended: Callable[[ExecRecord], None],
    ) -> None:
        self._db = db
        self._below = below
        self._journal = journal
        self._reconciler = reconciler
        self._caretaker = caretaker
        self._exec_ended = exec_ended
        self._next_seq = 0
        self._apply_lock = asyncio.Lock()
        self.settled = asyncio.Event()
        """Set once records agree with containerd for the first time."""
        self.connected = False
        reconciler.use(self.catch_up)

    async def run(self) -> None:
        """Follow for ever."""
        pause_s = _FIRST_PAUSE_S
        while True:
            began_s = time.monotonic()
            try:
                await self._round()
            except TheseusError as error:
                if self.connected:
                    log.warning("containerd lost", error=error.message)
            except Exception as error:  # a full disk, a fault of ours: it must go on all the same
                log.error("following the journal broke", exc_info=error)
            self._set_connected(False)
            if time.monotonic() - began_s > _LONGEST_PAUSE_S:
                pause_s = _FIRST_PAUSE_S
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)

    async def catch_up(self) -> None:
        """Deal with all events that are in the journal now.

        Raises:
            Unavailable: containerd cannot be reached.
        """
        await self._place()
        await self._apply_all(self._journal.read(self._next_seq, follow=False))

    async def _round(self) -> None:
        try:
            await self.catch_up()
        except OutOfRange:
            end = await self._journal.end()
            log.warning("journal truncated", from_seq=self._next_seq, to_seq=end)
            await self._jump(end)
        self._set_connected(True)
        await self._reconciler.all_live()
        self._caretaker.retry_now()
        if not self.settled.is_set():
            log.info("records settled", next_seq=self._next_seq)
            self.settled.set()
        await self._apply_all(self._journal.read(self._next_seq, follow=True))

    async def _place(self) -> None:
        """Where to read from; a journal that ends before it is not the one that we knew."""
        end = await self._journal.end()
        if self._next_seq == 0:
            recorded = await self._db.read(rows.journal_seq)
            if recorded is None:
                await self._jump(end)
                return
            self._next_seq = recorded + 1
        if self._next_seq > end:
            log.warning("journal began anew", our_seq=self._next_seq, its_seq=end)
            await self._jump(end)

    async def _jump(self, seq: int) -> None:
        async with self._apply_lock:
            await self._db.write(lambda tx: rows.set_journal_seq(tx, seq - 1))
            self._next_seq = seq

    async def _apply_all(self, events: AsyncIterator[RuntimeEvent]) -> None:
        """Apply events as they come; those that wait together share one transaction."""
        waiting: asyncio.Queue[RuntimeEvent | None] = asyncio.Queue(_BATCH_MAX)

        async def read() -> None:
            try:
                async for event in events:
                    await waiting.put(event)
            finally:
                with suppress(asyncio.QueueFull):  # whoever empties it looks at the task, too
                    waiting.put_nowait(None)

        reader = asyncio.create_task(read(), name="journal-reader")
        try:
            while not (reader.done() and waiting.empty()):
                batch = [event for event in await _take(waiting) if event is not None]
                if batch:
                    await self._apply(batch)
            await reader
        finally:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)

    async def _apply(self, batch: Sequence[RuntimeEvent]) -> None:
        async with self._apply_lock:
            last = batch[-1]
            if any(event.kind is not EventKind.OTHER for event in batch):
                applied = await self._db.write(lambda tx: self._apply_in(tx, batch))
                self._show(applied)
            # What means nothing to us costs no write: after a crash it is read again.
            self._next_seq = max(self._next_seq, last.next_seq)
        lag_s = max(0.0, (time.time_ns() - last.timestamp_ns) / 1e9) if last.timestamp_ns else 0.0
        self._below.observer.journal_read(seq=last.next_seq - 1, lag_s=lag_s)

    def _apply_in(self, tx: Transaction, batch: Sequence[RuntimeEvent]) -> _Applied:
        applied = _Applied([], [], [])
        done = rows.journal_seq(tx) or 0
        for event in batch:
            if event.next_seq - 1 > done and event.kind is not EventKind.OTHER:
                self._apply_one(tx, event, applied)
        rows.set_journal_seq(tx, max(done, batch[-1].next_seq - 1))
        return applied

    def _apply_one(self, tx: Transaction, event: RuntimeEvent, applied: _Applied) -> None:
        if event.exec_id:
            self._apply_exec(tx, event, applied)
            return
        identity = ContainerId(event.container_id)
        ended = False

        def change(present: ContainerRecord) -> ContainerRecord | None:
            nonlocal ended
            following = _after_event(present, event)
            ended = following is not None and present.live and not following.live
            return following

        changed = self._below.store.change_in(tx, identity, change)
        if changed is None:
            return
        applied.containers.append(changed)
        if ended:
            applied.ended.append(changed)
            status = outcome.lost(outcome.ENDED_WITH_CONTAINER, event.exited_at_ns)
            applied.execs.extend(self._below.execs.end_all_in(tx, identity, status))

    def _apply_exec(self, tx: Transaction, event: RuntimeEvent, applied: _Applied) -> None:
        if event.kind not in (EventKind.EXIT, EventKind.LOST):
            return
        status = _status(event)
        changed = self._below.execs.change_in(
            tx, ExecId(event.exec_id), lambda present: exec_store.end(present, status)
        )
        if changed is not None:
            applied.execs.append(changed)

    def _show(self, applied: _Applied) -> None:
        for record in applied.containers:
            self._below.store.publish(record)
        for exec_record in applied.execs:
            self._below.execs.publish(exec_record)
            self._exec_ended(exec_record)
        for record in applied.ended:
            if record.exit is not None:
                self._below.observer.ended(record.exit)
                log.info(
                    "container ended",
                    container_id=record.id,
                    exit_code=record.exit.code,
                    lost=record.exit.lost,
                    oom_killed=record.exit.oom_killed,
                )
            self._caretaker.tend(record.id)

    def _set_connected(self, connected: bool) -> None:
        if self.connected != connected:
            self.connected = connected
            self._below.observer.connected(connected)


async def _take(waiting: asyncio.Queue[RuntimeEvent | None]) -> list[RuntimeEvent | None]:
    """Wait for one, then take all that are there."""
    taken = [await waiting.get()]
    while not waiting.empty():
        taken.append(waiting.get_nowait())
    return taken


def _after_event(record: ContainerRecord, event: RuntimeEvent) -> ContainerRecord | None:
    match event.kind:
        case EventKind.EXIT | EventKind.LOST:
            return outcome.exited(record, pid=event.pid, status=_status(event))
        case EventKind.OOM if record.live:
            return dataclasses.replace(record, oom_killed=True)
        case EventKind.PAUSED if allows(record.state, Action.PAUSE):
            return dataclasses.replace(record, state=after(record, Action.PAUSE))
        case EventKind.RESUMED if record.state is State.PAUSED:
            return dataclasses.replace(record, state=after(record, Action.RESUME))
        case _:
            return None


def _status(event: RuntimeEvent) -> ExitStatus:
    if event.kind is EventKind.LOST:
        return outcome.lost(_LOST_WORDS, event.exited_at_ns)
    return ExitStatus(event.exit_code, event.exited_at_ns)
