"""How the processes of a container end.

Rules that the order of lines below keeps:

* An exit is handled under the process' lock, so that it waits for a start under way: the start is
  told before the exit.
* Init's exit is told last: what is left in the container is killed, and the exits of exec processes
  are told, before it.
* The exit record is on the spool first; then what is left in the pipes goes to the log (so that
  whoever hears of the exit finds the log complete), and then it is told.
* The unmounting and, a little later, the runtime's ``delete`` happen after that, on their own.
  The file system's end, and with it the disk, is waited for last (``RootFs.ended``).
  Delete waits for the unmounting, and where there are hooks, which ``delete`` runs, or where nobody
  would finish it, for both; it repeats what has failed by then.
"""

from __future__ import annotations

import asyncio
import contextlib
from functools import partial
from typing import TYPE_CHECKING, Any

import structlog

from services.shim import events
from services.shim.events import Event
from services.shim.process import ExitRecord, Process, Status, exit_fields

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from services.shim.container import Container
    from services.shim.reaper import Exit
    from services.shim.surroundings import Surroundings

log = structlog.get_logger(__name__)

_SETTLE_LIMIT_S = 2.0
_EXECS_LIMIT_S = 10.0


class Exits:
    """Handles the ends of one container's processes.

    Args:
        container: theirs.
        around: where they are told.
        changed: called when a process has ended.

    Attributes:
        own_pid_namespace: the end of init is that of all others.
        has_hooks: programs are to be run when the runtime deletes the container.
        init_is_gone: init has ended, whether or not that was told yet.
        oom_kills: how many the kernel killed for lack of memory, as far as was told.
    """

    def __init__(
        self, container: Container, around: Surroundings, changed: Callable[[], None]
    ) -> None:
        self.own_pid_namespace = False
        self.has_hooks = True
        self.init_is_gone = False
        self.oom_kills = 0
        self._container = container
        self._around = around
        self._changed = changed
        self._cleanup: asyncio.Task[None] | None = None
        self._forgetting: asyncio.Task[None] | None = None
        self._work: set[asyncio.Task[None]] = set()

    @property
    def work(self) -> set[asyncio.Task[None]]:
        """What is under way: the handling of exits, and the cleanup."""
        return set(self._work)

    def watcher(self, process: Process) -> Callable[[Exit], None]:
        """What is to be called when ``process`` has ended."""
        if process is self._container.init:
            return self._init_ended
        return partial(self._exec_ended, process)

    async def finish_cleanup(self) -> None:
        """Wait for what init's exit began, as far as Delete has to; afterwards see ``forgotten``.

        What has failed is done again, and raised if it fails again.
        """
        begun = self._cleanup is not None and await _succeeded(self._cleanup)
        if begun and (self._forgetting is None or not self._forgetting.done()):
            return
        if not begun or not await _succeeded(self._forgetting):
            await _succeeded(self._forgetting)  # one call of the runtime after the other
            await self._container.clean_up(force=True)
        self._forgetting = None

    @property
    def is_forgotten(self) -> bool:
        """Whether the runtime knows nothing of the container any more; after ``finish_cleanup``."""
        return self._forgetting is None

    async def forgotten(self) -> None:
        """Wait until the runtime has forgotten the container; tried again if that failed.

        Raises:
            TheseusError: it failed again.
        """
        if not await _succeeded(self._forgetting):
            await self._container.runtime.delete(force=True, hurry=False)
        self._forgetting = None

    def _init_ended(self, ended: Exit) -> None:
        self.init_is_gone = True
        self._do(self._handle_init_exit(ended), name="init exit")

    def _exec_ended(self, process: Process, ended: Exit) -> None:
        self._do(self._handle_exit(process, ended), name="exec exit")

    def _do(self, work: Coroutine[Any, Any, None], *, name: str) -> asyncio.Task[None]:
        return self._note(self._around.background.start(work, name=name))

    def _note(self, task: asyncio.Task[None]) -> asyncio.Task[None]:
        self._work.add(task)
        task.add_done_callback(self._work.discard)
        return task

    async def _handle_init_exit(self, ended: Exit) -> None:
        if not self.own_pid_namespace and self._container.cgroup is not None:
            emptied = await asyncio.to_thread(self._container.cgroup.kill_all)
            if not emptied:
                log.error("processes of the container do not die", container_id=self._container.id)
        await self._wait_for_execs()
        await self._handle_exit(self._container.init, ended)
        if self.has_hooks or not self._around.forgets_behind:
            self._cleanup = self._do(self._container.clean_up(force=False), name="clean up")
        else:
            self._cleanup = self._do(self._container.rootfs.unmount(), name="unmount")
            forgetting = self._around.background.start_behind(self._forget, name="delete")
            self._forgetting = self._note(forgetting)

    async def _forget(self) -> None:
        """Have the runtime forget the container: the deletion, asked for next, goes first."""
        await self._container.runtime.delete(force=False, hurry=False)

    async def _wait_for_execs(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_EXECS_LIMIT_S):
                for process in self._container.execs:
                    # A start under way ends one way or the other first.
                    async with process.lock:
                        started = process.status is Status.RUNNING
                    if started:
                        await process.wait()

    async def _handle_exit(self, process: Process, ended: Exit) -> None:
        async with process.lock:
            record = ExitRecord.of(ended, oom_killed=self._tell_oom())
            topic = events.TASK_LOST if record.lost else events.TASK_EXIT
            seq = self._around.events.record(Event(topic, exit_fields(process, record)))
            process.ended(record)
            self._changed()
            if process.io is not None:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_SETTLE_LIMIT_S):
                        await process.io.settle()
            self._around.events.offer(seq)
            process.tell()
        log.info(
            "process exited",
            container_id=self._container.id,
            exec_id=process.exec_id,
            exit_status=record.status,
            oom_killed=record.oom_killed,
            lost=record.lost,
        )

    def _tell_oom(self) -> bool:
        kills = (
            self._container.cgroup.oom_kills()
            if self._container.cgroup is not None and self._container.cgroup.own
            else 0
        )
        if kills <= self.oom_kills:
            return False
        self.oom_kills = kills
        self._around.events.emit(Event(events.TASK_OOM, {"container_id": self._container.id}))
        return True


async def _succeeded(task: asyncio.Task[None] | None) -> bool:
    """Whether a task comes to a good end; it is logged if not."""
    if task is None:
        return True
    await asyncio.wait([task])
    return not task.cancelled() and task.exception() is None
