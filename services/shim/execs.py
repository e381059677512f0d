"""The exec processes of one container: how they come, start and go.

Each is added with the OCI spec's ``process`` object, which is kept until it starts, and stays until
it is deleted. How they end is the business of ``exits.py``.
"""

from __future__ import annotations

import time
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

from services.common.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
)
from services.shim import events, launch
from services.shim.events import Event
from services.shim.process import Action, Process, Status

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from services.shim.container import Container
    from services.shim.stdio.uris import Stdio
    from services.shim.surroundings import Surroundings

_ID_MAX_CHARS = 128


class Execs:
    """Exec processes by id; iterating gives those that were not deleted, and may change them.

    Args:
        container: theirs.
        around: where they are told.
        changed: called when one was added, has started or is deleted.
    """

    def __init__(
        self, container: Container, around: Surroundings, changed: Callable[[], None]
    ) -> None:
        self._container = container
        self._around = around
        self._changed = changed
        self._processes: dict[str, Process] = {}
        self._specs: dict[str, Mapping[str, Any]] = {}

    def __iter__(self) -> Iterator[Process]:
        return iter(list(self._processes.values()))

    def find(self, exec_id: str) -> Process:
        """One by its id.

        Raises:
            NotFound: there is no such process.
        """
        try:
            return self._processes[exec_id]
        except KeyError:
            raise NotFound(
                f"container '{self._container.id}' has no process '{exec_id}'",
                resource=("exec", exec_id),
            ) from None

    def add(self, exec_id: str, spec: Mapping[str, Any], stdio: Stdio) -> None:
        """Add a process that ``start`` will run.

        Args:
            exec_id: its id, unique in the container.
            spec: the OCI spec's ``process`` object.
            stdio: its streams.

        Raises:
            AlreadyExists: the id is taken.
            FailedPrecondition: the container is paused or has ended.
        """
        if exec_id in self._processes:
            raise AlreadyExists(
                f"container '{self._container.id}' has a process '{exec_id}' already",
                resource=("exec", exec_id),
            )
        process = self._add(exec_id, spec, stdio)
        self._changed()
        self._emit(events.TASK_EXEC_ADDED, self._fields(process))

    async def run(self, exec_id: str, spec: Mapping[str, Any], stdio: Stdio) -> Process:
        """Add a process and start it, as ``add`` and ``start``.

        What a call before this one has done is not done again. One that cannot be started is
        deleted. Both are told, and written to the state, once it runs: a shim that dies before
        that leaves nothing of it, as one that dies over a start.
        """
        process = self._processes.get(exec_id)
        is_new = process is None
        if process is None:
            process = self._add(exec_id, spec, stdio)
        async with process.lock:
            if process.status is Status.CREATED:
                try:
                    await self.start(process, tell_added=is_new)
                except BaseException:
                    if process.status is Status.CREATED:
                        process.deleted()
                        self.drop(process)
                    raise
        return process

    async def start(self, process: Process, *, tell_added: bool = False) -> None:
        """Start one that may be started, under its lock.

        Raises:
            FailedPrecondition: init has ended, or is paused.
        """
        began = time.monotonic()
        try:
            await self._start(process, tell_added=tell_added)
        finally:
            process.attempted()
        self._around.metrics.exec_seconds.observe(time.monotonic() - began)

    def drop(self, process: Process) -> None:
        """Forget one that is deleted."""
        self._processes.pop(process.exec_id, None)
        self._specs.pop(process.exec_id, None)
        self._changed()

    def specs(self) -> dict[str, Mapping[str, Any]]:
        """Of those that have not been started, by id; go into the container's state."""
        return {
            exec_id: spec
            for exec_id, spec in self._specs.items()
            if self._processes[exec_id].status is Status.CREATED
        }

    def take(self, process: Process, spec: Mapping[str, Any] | None) -> None:
        """Have one of an earlier image, and its spec if it has not been started."""
        self._processes[process.exec_id] = process
        if spec is not None:
            self._specs[process.exec_id] = spec

    def _add(self, exec_id: str, spec: Mapping[str, Any], stdio: Stdio) -> Process:
        usable = exec_id and "/" not in exec_id and exec_id not in (".", "..")
        if not usable or len(exec_id) > _ID_MAX_CHARS:
            raise InvalidArgument(f"exec id '{exec_id}' is not usable", field="exec_id")
        self._container.init.check(Action.EXEC)
        process = Process(self._container.id, exec_id, stdio, release=self._around.keeping.release)
        self.take(process, {**spec, "terminal": stdio.terminal})
        return process

    async def _start(self, process: Process, *, tell_added: bool) -> None:
        container, around = self._container, self._around
        if container.exits.init_is_gone:
            raise FailedPrecondition(f"container '{container.id}' does not run: its init has ended")
        container.init.check(Action.EXEC)
        async with AsyncExitStack() as undo:
            process.io = await around.open_io(container.id, process.stdio)
            undo.push_async_callback(process.close_io, drain=False)
            process.io.change_owner(container.options.io_uid, container.options.io_gid)
            with around.reaper.window() as window:
                pid, master = await launch.run_exec(
                    container.runtime, container.bundle, process.io, self._specs[process.exec_id]
                )
                process.created(pid)
                process.io.start(master)
                around.hold(process)
                fields = self._fields(process)
                if tell_added:
                    self._emit(events.TASK_EXEC_ADDED, fields)
                process.apply(Action.START)
                self._changed()
                self._emit(events.TASK_EXEC_STARTED, {**fields, "pid": pid})
                around.reaper.watch(pid, container.exits.watcher(process), window)
            undo.pop_all()

    def _fields(self, process: Process) -> dict[str, object]:
        return {"container_id": self._container.id, "exec_id": process.exec_id}

    def _emit(self, topic: str, fields: Mapping[str, object]) -> None:
        self._around.events.emit(Event(topic, fields))
