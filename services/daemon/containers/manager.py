"""Containers as a whole: every verb that users have, in terms of the parts of this package."""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.common.errors import NotFound
from services.daemon.containers.outliving import OutlivingWork
from services.daemon.containers.record import State
from services.daemon.containers.signals import parse_signal
from services.daemon.containers.stop import SIGKILL

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

    from services.daemon.containers.below import Below
    from services.daemon.containers.caretaker import Caretaker
    from services.daemon.containers.create import Creator
    from services.daemon.containers.logfile import LogEntry
    from services.daemon.containers.logs import Logs, LogSelection
    from services.daemon.containers.record import (
        ContainerConfig,
        ContainerId,
        ContainerRecord,
        ExitStatus,
    )
    from services.daemon.containers.remove import Remover
    from services.daemon.containers.start import Starter
    from services.daemon.containers.stop import Stopper
    from services.daemon.containers.wait import Condition, Waiter


class ContainerManager:
    """The containers of one engine. References are ids, names, or unique prefixes of ids.

    A start and a removal that have begun go on when the caller goes away.
    """

    def __init__(
        self,
        below: Below,
        *,
        creator: Creator,
        starter: Starter,
        stopper: Stopper,
        remover: Remover,
        caretaker: Caretaker,
        waiter: Waiter,
        logs: Logs,
    ) -> None:
        self._below = below
        self._creator = creator
        self._starter = starter
        self._stopper = stopper
        self._remover = remover
        self._caretaker = caretaker
        self._waiter = waiter
        self._logs = logs
        self._uninterrupted = OutlivingWork()

    async def create(
        self, config: ContainerConfig, *, name: str = ""
    ) -> tuple[ContainerRecord, list[str]]:
        """See :meth:`Creator.create`."""
        return await self._creator.create(config, name=name)

    async def start(self, reference: str) -> None:
        """See :meth:`Starter.start`."""
        record = self._below.store.find(reference)
        await self._uninterrupted.run(self._starter.start(record.id), name="start")

    async def stop(self, reference: str, *, timeout_s: float | None = None) -> None:
        """See :meth:`Stopper.stop`."""
        await self._stopper.stop(self._below.store.find(reference).id, timeout_s=timeout_s)

    async def kill(self, reference: str, signal: str) -> None:
        """Send a signal by name or number; SIGKILL for an empty one. See :meth:`Stopper.kill`."""
        number = parse_signal(signal, default=SIGKILL)
        await self._stopper.kill(self._below.store.find(reference).id, number)

    async def remove(self, reference: str, *, force: bool = False, volumes: bool = False) -> str:
        """Remove a container; returns its id.

        It is gone when this returns; files that nobody can see go in the background.

        Raises:
            NotFound: there is no such container.
            FailedPrecondition: it runs, and ``force`` is not set.
        """
        record = self._below.store.find(reference)
        with self._below.observer.timed("remove"):
            if force:
                await self._stopper.kill_and_wait(record.id)
            work = self._remove(record.id, volumes=volumes)
            await self._uninterrupted.run(work, name="remove")
        return record.id

    async def wait(self, reference: str, condition: Condition) -> ExitStatus | None:
        """See :meth:`Waiter.wait`."""
        return await self._waiter.wait(reference, condition)

    def get(self, reference: str) -> ContainerRecord:
        """One container.

        Raises:
            NotFound: there is none.
        """
        return self._below.store.find(reference)

    def list_all(self, *, stopped: bool) -> list[ContainerRecord]:
        """Containers, newest first: all of them, or those that run."""
        shown = (r for r in self._below.store.list_all() if r.state is not State.CREATING)
        live = (State.RUNNING, State.PAUSED)
        return [record for record in shown if stopped or record.state in live]

    def log_path(self, container_id: ContainerId) -> Path:
        """Path of a container's log."""
        return self._below.files.log_path(container_id)

    def logs(self, reference: str, selection: LogSelection) -> AsyncGenerator[list[LogEntry], None]:
        """See :meth:`Logs.read`."""
        return self._logs.read(self._below.store.find(reference).id, selection)

    async def close(self, timeout_s: float) -> None:
        """Let what has begun come to its end, for a while."""
        await self._uninterrupted.close(timeout_s)
        await self._remover.close()
        await self._caretaker.close()

    async def _remove(self, container_id: ContainerId, *, volumes: bool) -> None:
        present = self._below.store.get(container_id)
        if present is not None and present.state is State.CREATING:
            async with self._below.locks.hold(container_id):  # until it is made, or undone
                pass
        try:
            record = await self._remover.begin(container_id, volumes=volumes)
        except NotFound:
            if self._below.store.tombstone(container_id) is None:
                raise
            return  # made to be removed at its end, and that was quicker
        try:
            if record.endpoints or record.ports or record.mounts:
                async with self._below.locks.hold(container_id):
                    await self._remover.withdraw(record)
        finally:
            await self._caretaker.finish_behind(container_id)
