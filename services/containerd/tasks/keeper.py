"""What becomes of shims that are silent or dead.

A shim that has not registered within the grace time, or that others wrote and never does, is
dialled and, if it answers, adopted; of the latter an exit that nobody was told is asked for. While
its process lives a shim is never given up: it is SILENT, and asked again. A process that ends is
noticed through its pidfd; a successor is started, which adopts the container, and where there can
be none the shim is buried. Which of these happened is a log line, a metric and an event of the
namespace: topic ``/shims/adopted``, ``/shims/replaced``, ``/shims/gone`` or ``/shims/void`` with a
``theseus.shim.v1.Hello`` that describes the shim and its processes.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import structlog

from services.common import linux
from services.common.errors import DeadlineExceeded, TheseusError, Unavailable
from services.containerd.tasks.gone import GoneShim
from services.containerd.tasks.journal import TOPIC_EXIT, ExitNotice, ShimNotice
from services.containerd.tasks.known import Standing
from services.containerd.tasks.processes import ProcessHandle, ProcessId
from services.containerd.tasks.shim import ProcessExit, TaskStatus

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from services.common.background import Background
    from services.containerd.tasks.gone import Epitaph
    from services.containerd.tasks.journal import TaskJournal
    from services.containerd.tasks.known import KnownShim
    from services.containerd.tasks.line import ShimLine, Way
    from services.containerd.tasks.metrics import TaskMetrics
    from services.containerd.tasks.shim import ShimAddress, ShimConnector

    Replace = Callable[[KnownShim], Awaitable[ShimAddress]]
    """Has a shim adopt the container of a dead one; raises TheseusError if none can."""
    from services.containerd.tasks.undertaker import Undertaker

log = structlog.get_logger(__name__)

_REDIAL_MAX_S = 10.0
_REPLACED_MAX = 5
_REPLACING_S = 60.0
_ASKED = frozenset({Standing.ADOPTING, Standing.SILENT})
_TAKEN_CARE_OF = frozenset(
    {
        Standing.STARTING,
        Standing.REPLACING,
        Standing.BURYING,
        Standing.GONE,
        Standing.REMOVING,
        Standing.REMOVED,
    }
)


class Keeper:
    """Follows each shim from the moment it is known to its end.

    Args:
        background: owns the tasks that follow.
        journal: for events.
        undertaker: for those that die.
        connect: makes the way to a shim.
        metrics: counts.
        remove: takes one away that has no task.
        grace_s: how long a shim has to register.
        replace: starts a successor that adopts the container; None: none is.
    """

    def __init__(
        self,
        *,
        background: Background,
        journal: TaskJournal,
        undertaker: Undertaker,
        connect: ShimConnector,
        metrics: TaskMetrics,
        remove: Callable[[KnownShim], Awaitable[bool]],
        grace_s: float,
        replace: Replace | None = None,
    ) -> None:
        self._replace = replace
        self._background = background
        self._journal = journal
        self._undertaker = undertaker
        self._connect = connect
        self._metrics = metrics
        self._remove = remove
        self._grace_s = grace_s

    def meet(
        self,
        known: KnownShim,
        process: ProcessId,
        address: str,
        version: str,
        line: ShimLine | None = None,
    ) -> None:
        """Learn, or learn anew, which process a shim is and where it serves.

        Args:
            known: the shim.
            process: it.
            address: where it serves.
            version: of its program; empty: nobody said.
            line: that on which it was asked to be one; its way becomes the shim's.
        """
        known.version = version or known.version
        known.line = line or known.line
        self.find_way(known, address, line.way if line is not None else None)
        if known.process != process:
            known.process = process
            watch = self._watch(known, process)
            known.watch = self._background.start(watch, name=f"watch {known.id}")

    def find_way(self, known: KnownShim, address: str, way: Way | None = None) -> None:
        """Learn where a shim serves, or would."""
        if known.address == address and known.shim is not None and way is None:
            return
        if known.shim is not None:
            self._background.start(known.shim.close(), name=f"close {known.id}")
        known.address = address
        known.shim = self._connect(
            namespace=known.namespace, container_id=known.id, address=address, way=way
        )

    def check(self, known: KnownShim) -> None:
        """See to a shim that may have died while somebody else took care of it."""
        if known.watch is None or known.watch.done():  # its end was seen, and left to them
            self._background.start(self._settle_dead(known), name=f"bury {known.id}")

    async def _watch(self, known: KnownShim, process: ProcessId) -> None:
        """See the shim's process end, and settle what follows."""
        handle = ProcessHandle.open(process)
        if handle is not None:
            with handle:
                await handle.ended()
        if known.process == process:
            await self._settle_dead(known)

    async def expect(self, known: KnownShim) -> None:
        """Give the shim its grace time; then ask, again and again while its process lives."""
        deadline = time.monotonic() + (0.0 if known.binary else self._grace_s)
        while known.standing is Standing.EXPECTED:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                known.turn(Standing.ADOPTING)
                break
            await known.change(timeout_s=left_s)
        pause_s = self._grace_s
        while known.standing in _ASKED:
            if await self._dial(known):
                return
            if known.process is None:  # it never said who it was, and nobody listens there
                await self._settle_dead(known)
                return
            if known.standing is Standing.ADOPTING:
                log.error("shim is silent", namespace=known.namespace, container=known.id)
                known.turn(Standing.SILENT)
            await known.change(timeout_s=pause_s)
            pause_s = min(pause_s * 2, _REDIAL_MAX_S)

    async def _dial(self, known: KnownShim) -> bool:
        """Ask a shim that did not register; returns whether its fate is settled."""
        assert known.shim is not None, "a shim that is expected has an address"
        try:
            info = await known.shim.connect()
        except (Unavailable, DeadlineExceeded):
            return known.standing not in _ASKED
        except TheseusError as error:
            log.warning("shim answers with an error", container=known.id, error=error.message)
            return False
        if known.inherited and not info.task_pid and not known.is_sandbox:
            log.warning("shim without a task is removed", namespace=known.namespace, id=known.id)
            await self._remove(known)
            return True
        if known.standing in _ASKED:
            if known.process is None:
                start_time = await asyncio.to_thread(linux.process_start_time, info.shim_pid)
                self.meet(
                    known, ProcessId(info.shim_pid, start_time or 0), known.address, info.version
                )
            known.inherited = False
            if known.binary and not known.is_sandbox:
                await self._catch_up(known)
            known.turn(Standing.REACHABLE)
            await self._announce(known, "adopted")
        return True

    async def _catch_up(self, known: KnownShim) -> None:
        """Journal the end of a container that its shim could not tell, as nobody was there."""
        assert known.shim is not None, "it was dialled"
        try:
            state = await known.shim.state("")
        except TheseusError as error:
            log.warning("state of a task is not known now", container=known.id, error=error.message)
            return
        if state.status is not TaskStatus.STOPPED:
            return
        end = ProcessExit(state.exit_status, state.exited_at_ns, state.pid)
        known.exits[""] = end
        message = self._journal.codec.encode_exit(ExitNotice(known.id, "", end))
        await self._journal.say_for(known.namespace, known.instance_id, [(TOPIC_EXIT, message)])

    async def _settle_dead(self, known: KnownShim) -> None:
        """Bury a shim whose process has ended, unless somebody is at work on it already."""
        if known.standing in _TAKEN_CARE_OF:
            return
        pid = known.process.pid if known.process is not None else 0
        reason = f"its shim (pid {pid}) has died" if pid else "its shim never came up"
        failure = await self._find_successor(known) if pid else ""
        if failure is None:
            return
        if failure:
            reason = f"{reason} and has no successor: {failure}"
        await self._settle(known, "gone", reason)

    async def _find_successor(self, known: KnownShim) -> str | None:
        """Have a new shim adopt the container; returns why there is none, None when there is."""
        if self._replace is None or known.binary or known.is_sandbox:
            return ""
        now = time.monotonic()
        known.replaced_at = [at for at in known.replaced_at if now - at < _REPLACING_S]
        if len(known.replaced_at) >= _REPLACED_MAX:
            return f"{_REPLACED_MAX} of them have died within {_REPLACING_S:.0f} s"
        known.replaced_at.append(now)
        known.turn(Standing.REPLACING)
        if known.session is not None:
            known.session.end()
        try:
            address = await self._replace(known)
        except TheseusError as error:
            log.error("dead shim has no successor", container=known.id, reason=error.message)
            return error.message
        if known.standing is not Standing.REPLACING:  # its task is being deleted
            return None
        log.debug("dead shim has a successor", container=known.id, pid=address.process.pid)
        registered = known.session is not None
        known.turn(Standing.REGISTERED if registered else Standing.REACHABLE)
        await self._announce(known, "replaced")
        return None

    async def settle_void(self, known: KnownShim) -> None:
        """Bury a shim of another boot."""
        await self._settle(known, "void", "the machine was restarted", same_boot=False)

    async def _settle(
        self, known: KnownShim, outcome: str, reason: str, *, same_boot: bool = True
    ) -> None:
        known.turn(Standing.BURYING)
        if known.session is not None:
            known.session.end()
        if known.shim is not None:
            await known.shim.close()
        epitaph = await self._undertaker.bury(known, reason, same_boot=same_boot)
        known.shim = GoneShim(epitaph)
        await self._announce(known, outcome, epitaph)
        if "" in epitaph.processes:
            known.turn(Standing.GONE)
        else:
            await self._remove(known)

    async def _announce(
        self, known: KnownShim, outcome: str, epitaph: Epitaph | None = None
    ) -> None:
        self._metrics.settled.labels(outcome).inc()
        words = {} if epitaph is None else epitaph.processes
        log.warning(
            "shim settled",
            outcome=outcome,
            namespace=known.namespace,
            container=known.id,
            reason="" if epitaph is None else epitaph.reason,
            lost=[exec_id for exec_id, end in words.items() if end.exit is None],
        )
        notice = ShimNotice(
            namespace=known.namespace,
            id=known.id,
            instance_id=known.instance_id,
            pid=known.process.pid if known.process is not None else 0,
            start_time=known.process.start_time if known.process is not None else 0,
            bundle=str(known.bundle.path),
            exits=tuple(ExitNotice(known.id, exec_id, end.exit) for exec_id, end in words.items()),
        )
        message = self._journal.codec.encode_shim(notice)
        await self._journal.say(known.namespace, f"/shims/{outcome}", message)
