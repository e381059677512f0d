"""Registration: what a shim and containerd tell each other first, and the events that follow.

Events are committed in batches: while one commit waits for the disk the next events gather, and
those that nobody waits for do for a moment. An acknowledgement means that an event, and all before
it, are in the journal on the disk; until then the shim has them on its spool.
"""

from __future__ import annotations

import asyncio
import re
from collections import deque
from typing import TYPE_CHECKING

import structlog

from services.common.background import BEHIND_S
from services.common.errors import Aborted, FailedPrecondition, InvalidArgument, NotFound
from services.common.frozen import frozen
from services.containerd.tasks.journal import TOPIC_DELETE, TOPIC_EXEC_ADDED, TOPIC_EXIT
from services.containerd.tasks.known import Standing
from services.containerd.tasks.shim import ProcessState, TaskStatus

if TYPE_CHECKING:
    from collections.abc import Callable

    from services.containerd.tasks.journal import ShimEvent, TaskJournal
    from services.containerd.tasks.known import KnownShim
    from services.containerd.tasks.shim import ProcessExit, Stdio

log = structlog.get_logger(__name__)

PROTOCOL = 1
_BATCH_MAX = 256
# They follow from a call that was answered, and mostly another event follows in milliseconds.
_UNHURRIED = frozenset(
    {"/tasks/create", "/tasks/start", "/tasks/exec-added", "/tasks/exec-started"}
)
_WITHOUT_CHANGE = frozenset({"/tasks/exec-started", "/tasks/oom"})
_STATUS = {
    "created": TaskStatus.CREATED,
    "running": TaskStatus.RUNNING,
    "paused": TaskStatus.PAUSED,
    "stopped": TaskStatus.STOPPED,
}
_INSTANCE_ID = re.compile(r"[0-9a-f]{32}")


@frozen
class HelloProcess:
    """A process as its shim reports it.

    ``exit`` is set once it has stopped, unless it is lost. ``stdio`` is None where the shim does
    not tell.
    """

    container_id: str
    exec_id: str
    pid: int
    status: str
    exit: ProcessExit | None = None
    stdio: Stdio | None = None

    def state(self) -> ProcessState | None:
        """As its shim would say if it were asked; None where that is not all here."""
        status = _STATUS.get(self.status)
        is_lost = status is TaskStatus.STOPPED and self.exit is None
        if self.stdio is None or status is None or is_lost:
            return None
        return ProcessState(
            id=self.exec_id or self.container_id,
            pid=self.pid,
            status=status,
            stdio=self.stdio,
            exit_status=self.exit.exit_status if self.exit else 0,
            exited_at_ns=self.exit.exited_at_ns if self.exit else 0,
        )


@frozen
class Hello:
    """Who a shim is and what it holds."""

    namespace: str
    id: str
    instance_id: str
    pid: int
    start_time: int
    boot_id: str
    address: str
    version: str
    protocol_min: int
    protocol_max: int
    bundle: str
    processes: tuple[HelloProcess, ...] = ()
    first_seq: int = 0
    last_seq: int = 0


@frozen
class Welcome:
    """containerd's answer."""

    containerd_id: str
    epoch: int
    last_acked_seq: int
    protocol: int = PROTOCOL


def check_hello(hello: Hello, *, boot_id: str) -> None:
    """Refuse a Hello that makes no sense whoever sent it.

    Raises:
        InvalidArgument: an id is missing or malformed.
        FailedPrecondition: it is from another boot, or speaks another protocol.
    """
    for name in ("namespace", "id", "address", "bundle"):
        if not getattr(hello, name):
            raise InvalidArgument(f"hello without {name}", field=name)
    if not _INSTANCE_ID.fullmatch(hello.instance_id):
        raise InvalidArgument("instance_id must be 32 hex digits", field="instance_id")
    if hello.pid <= 0 or hello.start_time <= 0:
        raise InvalidArgument("hello without pid and start time", field="pid")
    if hello.boot_id != boot_id:
        raise FailedPrecondition(
            f"shim '{hello.id}' is of boot {hello.boot_id}, this is boot {boot_id}"
        )
    if not hello.protocol_min <= PROTOCOL <= hello.protocol_max:
        raise FailedPrecondition(
            f"shim '{hello.id}' speaks protocol {hello.protocol_min} to {hello.protocol_max}, "
            f"this containerd speaks {PROTOCOL}"
        )


def check_identity(hello: Hello, known: KnownShim | None) -> KnownShim:
    """Refuse a Hello of a shim that is not the one of this bundle; returns that one.

    Raises:
        NotFound: there is none, it was given up, or the bundle or the instance differ.
    """
    if known is None or known.standing in (Standing.BURYING, Standing.GONE, Standing.REMOVED):
        raise NotFound(f"bundle {hello.bundle} is not this containerd's: it has no such task")
    if hello.instance_id != known.instance_id or hello.bundle != str(known.bundle.path):
        raise NotFound(
            f"bundle {hello.bundle} of instance {hello.instance_id} is not this containerd's: "
            f"task '{known.id}' has instance {known.instance_id} in {known.bundle.path}"
        )
    return known


class ShimSession:
    """One registration stream: events are offered on one side, acknowledgements come out.

    Args:
        known: whose.
        journal: where the events go.
        progress: the last event of this shim that is in the journal.
        closed: called once when the session is over.
    """

    def __init__(
        self,
        known: KnownShim,
        journal: TaskJournal,
        *,
        progress: int,
        closed: Callable[[ShimSession], None],
    ) -> None:
        self.known = known
        self._journal = journal
        self._last_seq = progress
        self._closed = closed
        self._pending: deque[ShimEvent] = deque()
        self._room = asyncio.Event()
        self._wake = asyncio.Event()
        self._due: asyncio.TimerHandle | None = None
        self._ended = False
        self._failure: Exception | None = None

    async def offer(self, event: ShimEvent) -> None:
        """Take an event in; waits while a full batch is waiting for the disk."""
        while len(self._pending) >= _BATCH_MAX:
            self._wake.set()
            self._room.clear()
            await self._room.wait()
        self._pending.append(event)
        if event.topic == TOPIC_EXIT:
            self.known.forget_state()
        if self._is_waited_for(event):
            self._wake.set()
        elif self._due is None:
            self._due = asyncio.get_running_loop().call_later(BEHIND_S, self._wake.set)

    def _is_waited_for(self, event: ShimEvent) -> bool:
        if event.topic == TOPIC_EXIT:  # who waits for the process itself hears it of the shim
            return self._journal.is_followed
        return event.topic not in _UNHURRIED

    def end(self, failure: Exception | None = None) -> None:
        """No more events will come; with ``failure`` the session ends with that error at once."""
        self._ended = True
        self._failure = self._failure or failure
        self._wake.set()

    def replace(self) -> None:
        """End the session because the shim has opened a newer one."""
        self.end(Aborted(f"shim '{self.known.id}' has registered again: this stream is void"))

    def close(self) -> None:
        """Nobody reads acknowledgements any more. Idempotent."""
        self._closed(self)

    async def next_ack(self) -> int | None:
        """Journal what has gathered; returns the number to acknowledge, None at the end.

        Raises:
            Aborted: a newer session took over.
        """
        await self._wake.wait()
        if not self._ended:
            self._wake.clear()
        if self._due is not None:
            self._due.cancel()
            self._due = None
        if self._failure is not None:
            raise self._failure
        if not self._pending:
            return None
        batch = list(self._pending)
        self._pending.clear()
        self._room.set()
        self._check_order(batch)
        await self._journal.record(self.known.namespace, self.known.instance_id, batch)
        note_events(self.known, batch, self._journal)
        return self._last_seq

    def _check_order(self, batch: list[ShimEvent]) -> None:
        for event in batch:
            if event.seq > self._last_seq + 1:
                log.error(
                    "shim skipped events",
                    container=self.known.id,
                    expected=self._last_seq + 1,
                    seq=event.seq,
                )
            self._last_seq = max(self._last_seq, event.seq)


def note_events(known: KnownShim, events: list[ShimEvent], journal: TaskJournal) -> None:
    """Remember what journaled events say about processes, for those who wait for them."""
    for event in events:
        if event.topic == TOPIC_EXIT:
            notice = journal.codec.decode_exit(event.event)
            if notice is not None and notice.exit is not None:
                known.exits[notice.exec_id] = notice.exit
            if notice is None or not notice.exec_id:
                known.forget_state()
        elif event.topic == TOPIC_EXEC_ADDED:
            known.exits.pop(journal.codec.decode_exec_added(event.event), None)
        elif event.topic == TOPIC_DELETE:
            known.deletion_told.set()
        elif event.topic not in _WITHOUT_CHANGE:
            known.forget_state()
