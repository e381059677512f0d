"""The end of shims: burial of one that died, removal of one whose task is deleted.

Burial keeps what is true about the processes and takes away what is left of them:

    spool -> journal · processes killed · how they ended -> journal · runtime's leftovers, mounts
    -> gone.json

A process that still ran when its shim had died is killed here, and the kernel tells how it ended
(``PIDFD_GET_INFO``), so that is true as well. Where no record exists, the status is lost, and the
event says so: topic ``/tasks/lost``, a ``theseus.shim.v1.ProcessState`` with ``exit_status_lost``.

Removal: on record · shim told to go, then killed (or, where its process serves others
too, told to serve this one no longer; one that waits for another container has gone, too) · spool
-> journal · leftovers, mounts, bundle. Both sequences can be repeated from the start after a crash
at any step. Whoever deletes a task waits for the first step of a removal; the rest follows behind
its back. On record is what ``deleting`` says, or the shim itself: if the last event of it in the
journal is ``/tasks/delete``, its task was deleted, and ``deleting`` is written behind the answer.

A shim says that a container is deleted before the runtime has forgotten it, and goes when it has.
One that dies in between has it in state.json still, so the runtime is told here; until then a new
task of the same id waits, as for all of a removal.
"""

from __future__ import annotations

import asyncio
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import structlog

from services.common.background import Background
from services.common.errors import NotFound, TheseusError
from services.containerd.tasks.bundle import GONE_FILE, unmount_beneath
from services.containerd.tasks.foreign import socket_of
from services.containerd.tasks.gone import Epitaph, LastWords
from services.containerd.tasks.journal import TOPIC_EXIT, TOPIC_LOST, ExitNotice
from services.containerd.tasks.processes import ProcessHandle
from services.containerd.tasks.registration import note_events
from services.containerd.tasks.remains import (
    RemainingProcess,
    Remains,
    delete_container,
    read_remains,
    read_spool,
    thaw_container,
)
from services.containerd.tasks.sharing import leave
from services.containerd.tasks.shim import ProcessExit

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from services.containerd.tasks.fd_keeper import DescriptorKeeper
    from services.containerd.tasks.foreign import ShimPrograms
    from services.containerd.tasks.journal import TaskJournal
    from services.containerd.tasks.known import KnownShim
    from services.containerd.tasks.shim import Shim

    Thaw = Callable[[], Awaitable[None]]
    """Lets a frozen container go on, as it cannot die otherwise."""

log = structlog.get_logger(__name__)

_FROZEN_S = 0.5
_KILL_S = 5.0
_REAP_S = 2.0
_REAP_POLL_S = 0.01
_GO_S = 5.0


class Undertaker:
    """Buries and removes. One call at a time for one shim.

    Args:
        journal: takes what the dead have to say.
        keeper: holds descriptors of shims, which are of no use any more; None where there is none.
        programs: cleans up after shims that others wrote; None where there are none.
    """

    def __init__(
        self,
        journal: TaskJournal,
        keeper: DescriptorKeeper | None = None,
        programs: ShimPrograms | None = None,
    ) -> None:
        self._journal = journal
        self._keeper = keeper
        self._programs = programs

    async def bury(self, known: KnownShim, reason: str, *, same_boot: bool = True) -> Epitaph:
        """Settle what a shim whose process is gone has left.

        Args:
            known: the shim; its ``exits`` are brought up to date.
            reason: why there is no shim, as a clause.
            same_boot: whether its pids can still mean its processes.

        Returns:
            How the processes ended. Without any, the container was never made.
        """
        await self.drain(known)
        journaled = await self._journal.exits(known.instance_id)
        remains = await asyncio.to_thread(_read_remains, known)
        if remains is None:  # the journal is all that there is to go by
            remains = Remains({exec_id: RemainingProcess(exec_id, 0, 0) for exec_id in journaled})
        words = {
            exec_id: LastWords(remains.processes[exec_id].pid, end, "" if end else reason)
            for exec_id, end in journaled.items()
            if exec_id in remains.processes
        }
        untold = [
            process
            for exec_id, process in remains.processes.items()
            if exec_id not in journaled and process.pid  # without a pid it was never started
        ]
        thaw = partial(self._clean_up, known, remains)
        if not known.binary:
            thaw = partial(thaw_container, remains, known.id)
        words |= await self._end_processes(known, untold, reason, thaw if same_boot else None)
        known.exits |= {exec_id: w.exit for exec_id, w in words.items() if w.exit is not None}
        await self._clean_up(known, remains)
        epitaph = Epitaph(known.id, reason, words)
        await asyncio.to_thread(_close_grave, known, epitaph)
        self._release(known)
        return epitaph

    async def mark(self, known: KnownShim, note: Mapping[str, Any]) -> None:
        """Record that shim and bundle are to go: whoever finds the record goes on with it.

        Args:
            known: the shim.
            note: goes into the ``deleting`` file.
        """
        await asyncio.to_thread(_mark, known, note)

    async def remove(self, known: KnownShim, *, clean: bool, shared: bool = False) -> None:
        """Take away shim and bundle, after :meth:`mark`.

        Args:
            known: the shim.
            clean: the shim has deleted the container already, or is about to by itself.
            shared: its process serves others too, and goes on.
        """
        if not shared or not await self._part(known, now=not clean):
            await self._send_away(known, now=not clean)
        await self.drain(known)
        if not clean or not known.binary:
            remains = await asyncio.to_thread(_read_remains, known)
            if remains is not None:
                await self._clean_up(known, remains)
        if known.binary and not shared and known.address:
            await asyncio.to_thread(socket_of(known.address).unlink, missing_ok=True)
        await asyncio.to_thread(known.bundle.remove, shared=shared)
        self._release(known)
        await self._journal.forget(known.instance_id)

    async def _clean_up(self, known: KnownShim, remains: Remains) -> None:
        """Have what is left of a container killed and taken away. Never raises."""
        if not known.binary:
            await delete_container(remains, known.id)
        elif self._programs is not None:
            await self._programs.delete(known.binary, known.bundle)

    def _release(self, known: KnownShim) -> None:
        if self._keeper is not None and known.instance_id:
            self._keeper.release(known.instance_id)

    async def drain(self, known: KnownShim) -> None:
        """Journal what is on the spool of a shim that does not send any more."""
        events = await asyncio.to_thread(
            read_spool, known.bundle, self._journal.codec.decode_spooled
        )
        if not events:
            return
        # The last event stays on a spool when it is acknowledged: mostly it is all that is there.
        if events[-1].seq > await self._journal.progress(known.instance_id):
            await self._journal.record(known.namespace, known.instance_id, events)
        note_events(known, events, self._journal)

    async def _part(self, known: KnownShim, *, now: bool) -> bool:
        """See the shim's process serve it no longer; returns whether it does as it is asked.

        One that does not is killed, and those that it serves too are taken over by another.
        """
        if not await leave(known, now=now, limit_s=_GO_S):
            log.error("shim does not let go", container=known.id, process=known.process)
            return False
        if known.shim is not None:
            await known.shim.close()
        return True

    async def _send_away(self, known: KnownShim, *, now: bool) -> None:
        """See the shim's process end, or wait for another container: asked first, then killed.

        Unless it has to be ``now``, it goes when all of its events are acknowledged; some may be
        in its memory only, where its disk was full.
        """
        process = known.process or await asyncio.to_thread(known.bundle.process)
        handle = None if process is None else ProcessHandle.open(process)
        is_free = False
        if handle is not None:
            with handle:
                async with Background() as background:
                    if known.shim is not None:
                        background.start(
                            _ask_to_go(known.shim, now=now), name=f"shutdown {known.id}"
                        )
                        try:
                            async with asyncio.timeout(_GO_S):
                                is_free = await _waits_again(known)
                                if not is_free:
                                    await handle.ended()
                        except TimeoutError:
                            log.warning("shim does not go", container=known.id)
                # It is still this task's alone: see ``line.py``.
                if not is_free and not await handle.kill(timeout_s=_KILL_S):
                    log.error("shim cannot be killed", container=known.id, pid=handle.process.pid)
        if known.shim is not None:
            await known.shim.close()

    async def _end_processes(
        self,
        known: KnownShim,
        processes: list[RemainingProcess],
        reason: str,
        thaw: Thaw | None,
    ) -> dict[str, LastWords]:
        """Kill what still runs and say how each ended; init is the last to be told of."""
        ordered = sorted(processes, key=lambda process: process.exec_id == "")
        ends = await asyncio.gather(*(_end(process, reason, thaw) for process in ordered))
        words = {process.exec_id: end for process, end in zip(ordered, ends, strict=True)}
        messages = []
        for exec_id, end in words.items():
            notice = ExitNotice(known.id, exec_id, end.exit)
            topic = TOPIC_LOST if end.exit is None else TOPIC_EXIT
            messages.append((topic, self._journal.codec.encode_exit(notice)))
        if messages:
            await self._journal.say_for(known.namespace, known.instance_id, messages)
        return words


async def _end(process: RemainingProcess, reason: str, thaw: Thaw | None) -> LastWords:
    """How one process ended, made to end if it still runs; left alone without ``thaw``."""
    if process.exit is not None:
        return LastWords(process.pid, process.exit)
    identity = process.identity()
    handle = ProcessHandle.open(identity) if identity is not None and thaw else None
    if handle is None or thaw is None:
        return LastWords(process.pid, lost=f"it ended unseen after {reason}")
    with handle:
        if not await handle.kill(timeout_s=_FROZEN_S):
            await thaw()
        if not await handle.kill(timeout_s=_KILL_S):
            return LastWords(process.pid, lost=f"it does not end after SIGKILL, and {reason}")
        status = await _status_once_reaped(handle)
    if status is None:
        return LastWords(process.pid, lost=f"it was killed because {reason}; no record was kept")
    return LastWords(process.pid, ProcessExit(status, time.time_ns(), process.pid))


async def _status_once_reaped(handle: ProcessHandle) -> int | None:
    """The kernel's record, which is there once the new parent has reaped the process."""
    deadline = time.monotonic() + _REAP_S
    while (status := handle.exit_status()) is None and time.monotonic() < deadline:  # noqa: ASYNC110 - no event tells of the reaping
        await asyncio.sleep(_REAP_POLL_S)
    return status


def _read_remains(known: KnownShim) -> Remains | None:
    """What is known of a container whose shim is dead. Blocks."""
    if not known.binary:
        return read_remains(known.bundle)
    try:
        pid, start_time = known.bundle.record().init
    except NotFound:
        return None
    return Remains({"": RemainingProcess("", pid, start_time)} if pid else {})


async def _waits_again(known: KnownShim) -> bool:
    return known.line is not None and await known.line.waits_again()


async def _ask_to_go(shim: Shim, *, now: bool) -> None:
    try:
        await shim.shutdown(now=now)
    except TheseusError as error:  # it may be gone before it answers
        log.debug("shutdown of a shim not answered", reason=error.message)


def _mark(known: KnownShim, note: Mapping[str, Any]) -> None:
    if known.bundle.exists():
        known.bundle.begin_deletion(dict(note))


def _close_grave(known: KnownShim, epitaph: Epitaph) -> None:
    unmount_beneath(known.bundle.path)
    known.bundle.write_json(GONE_FILE, epitaph.to_json())
