"""Stopping and killing: signals to init, and waiting for what they do."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING

from services.common.errors import DeadlineExceeded, FailedPrecondition, NotFound
from services.daemon.containers import plan
from services.daemon.containers.record import ContainerRecord, State

if TYPE_CHECKING:
    from services.daemon.containers.below import Below
    from services.daemon.containers.record import ContainerId

SIGKILL = 9
_KILL_TIMEOUT_S = 10.0


class Stopper:
    """Ends the init processes of containers."""

    def __init__(self, below: Below) -> None:
        self._below = below

    async def stop(self, container_id: ContainerId, *, timeout_s: float | None = None) -> None:
        """Send the stop signal, and SIGKILL after a while; does nothing when nothing runs.

        Args:
            container_id: whose init.
            timeout_s: None for the container's own; negative waits without limit.

        Raises:
            NotFound: it was removed meanwhile.
            DeadlineExceeded: it does not end after SIGKILL.
        """
        with self._below.observer.timed("stop"):
            record = await self._past_start(container_id)
            if not record.live:
                return
            wait_s = record.config.stop_timeout_s if timeout_s is None else timeout_s
            await self._signal(record, plan.stop_signal(record))
            if not await self._ended(record, None if wait_s < 0 else wait_s):
                await self._kill(record)

    async def kill(self, container_id: ContainerId, signal: int) -> None:
        """Send a signal.

        Raises:
            FailedPrecondition: it does not run.
        """
        record = await self._past_start(container_id)
        not_running = FailedPrecondition(
            f"Cannot kill container: {record.name}: container {record.id} is not running",
            resource=("container", record.id),
        )
        if not record.live:
            raise not_running
        try:
            await self._below.tasks.kill(record.id, signal)
        except (NotFound, FailedPrecondition) as error:
            raise not_running from error

    async def kill_and_wait(self, container_id: ContainerId) -> None:
        """Send SIGKILL and wait until it has ended; does nothing when nothing runs.

        Raises:
            DeadlineExceeded: it does not end.
        """
        record = await self._past_start(container_id)
        if record.live:
            await self._kill(record)

    async def _kill(self, record: ContainerRecord) -> None:
        await self._signal(record, SIGKILL)
        present = self._below.store.get(record.id)
        if present is not None and present.state is State.PAUSED:
            # A process that cgroup v1 has frozen dies only when it is thawed.
            with suppress(NotFound, FailedPrecondition):
                await self._below.tasks.resume(record.id)
        if not await self._ended(record, _KILL_TIMEOUT_S):
            raise DeadlineExceeded(
                f"container {record.id} did not end within {_KILL_TIMEOUT_S:.0f} s of SIGKILL",
                resource=("container", record.id),
            )

    async def _past_start(self, container_id: ContainerId) -> ContainerRecord:
        """The record, once no start is under way."""
        record = self._below.store.require(container_id)
        if record.state is State.STARTING:
            async with self._below.locks.hold(container_id):
                record = self._below.store.require(container_id)
        return record

    async def _signal(self, record: ContainerRecord, signal: int) -> None:
        # It may have ended by itself; then its end is on the way here.
        with suppress(NotFound, FailedPrecondition):
            await self._below.tasks.kill(record.id, signal)

    async def _ended(self, record: ContainerRecord, timeout_s: float | None) -> bool:
        try:
            async with asyncio.timeout(timeout_s):
                await self._below.store.until(
                    record.id, lambda now: not now.live or now.runs != record.runs
                )
        except TimeoutError:
            return False
        return True
