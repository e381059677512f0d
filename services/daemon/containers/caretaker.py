"""What has to be done for containers that nobody is waiting for, until it is done.

    exited     cleaned up; removed, if it was created to be
    created    cleaned up, after a start that was given up
    removing   removed to the end, behind the answer; so is what a crash left half created

One task for each container that needs it; a failure is tried again, with growing pauses, and at
once when containerd comes back.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING

import structlog

from services.common.errors import DeadlineExceeded, TheseusError, Unavailable
from services.daemon.containers.record import ContainerRecord, State
from services.daemon.together import first

if TYPE_CHECKING:
    from services.common.background import Background
    from services.daemon.containers.below import Below
    from services.daemon.containers.cleanup import Cleaner
    from services.daemon.containers.record import ContainerId
    from services.daemon.containers.remove import Remover

log = structlog.get_logger(__name__)

_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 30.0
_BEHIND_MAX = 32
_BEHIND_LIMIT_S = 10.0
_CLOSING_LIMIT_S = 5.0


class Caretaker:
    """Looks after containers in the background.

    Args:
        background: owns the tasks.
        grace_s: after a start of the daemon clients that were attached get this long to attach
            again, before what they want to read is taken away.
    """

    def __init__(
        self,
        below: Below,
        cleaner: Cleaner,
        remover: Remover,
        background: Background,
        *,
        grace_s: float,
    ) -> None:
        self._below = below
        self._cleaner = cleaner
        self._remover = remover
        self._background = background
        # The event: it is done, or put off.
        self._tending: dict[ContainerId, asyncio.Event] = {}
        self._again: set[ContainerId] = set()
        self._retry = asyncio.Event()
        self._grace_s = grace_s
        self._grace_over = asyncio.Event()

    async def returned(self) -> None:
        """The daemon has just started, and nobody can reach it yet: tend to everyone."""
        store = self._below.store
        for record in store.list_all():
            # One that was never finished, or that a version before this one was removing: its name
            # is free before anybody can ask for it.
            if record.state in (State.CREATING, State.REMOVING):
                volumes = record.remove_volumes or record.state is State.CREATING
                await self._remover.begin(record.id, volumes=volumes)
            elif self._needed(record):
                self.tend(record.id)
        for record in store.leaving():
            self.tend(record.id)

    def serving(self) -> None:
        """Clients can reach the daemon: their time to come back begins."""
        self._background.start(self._end_grace(), name="grace")

    def retry_now(self) -> None:
        """containerd is back: what failed for want of it may go through."""
        self._retry.set()
        self._retry = asyncio.Event()

    def tend(self, container_id: ContainerId) -> None:
        """Look after a container as its state wants it; returns at once."""
        if container_id in self._tending:
            self._again.add(container_id)
            return
        self._tending[container_id] = asyncio.Event()
        self._background.start(self._tend(container_id), name=f"tend-{container_id[:12]}")

    async def finish_behind(self, container_id: ContainerId) -> None:
        """Finish a removal in the background; waits for it only when too many are under way.

        So whoever removes faster than can be removed is held up, within a limit.
        """
        self.tend(container_id)
        if len(self._tending) > _BEHIND_MAX:
            await _all([self._tending[container_id]], timeout_s=_BEHIND_LIMIT_S)

    async def close(self) -> None:
        """Let removals that are under way come to their end, for a while."""
        leaving = (self._tending.get(record.id) for record in self._below.store.leaving())
        await _all([event for event in leaving if event], timeout_s=_CLOSING_LIMIT_S)

    async def _tend(self, container_id: ContainerId) -> None:
        try:
            while True:
                self._again.discard(container_id)
                await self._until_done(container_id)
                if container_id not in self._again:
                    return
        finally:
            self._tending.pop(container_id).set()
            self._again.discard(container_id)

    async def _until_done(self, container_id: ContainerId) -> None:
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                if await self._tell_the_end(container_id) and not self._grace_over.is_set():
                    removed = self._below.store.until(container_id, lambda _now: False)
                    await first(self._grace_over.wait(), removed)
                async with self._below.locks.hold(container_id):
                    await self._once(container_id)
                return
            except (Unavailable, DeadlineExceeded) as error:
                log.debug("clean-up postponed", container_id=container_id, error=error.message)
            except TheseusError as error:
                log.warning("clean-up failed", container_id=container_id, error=error.message)
            except Exception as error:  # a full disk, a fault of ours: nobody else would go on
                log.error("clean-up broke", container_id=container_id, exc_info=error)
            self._tending[container_id].set()
            with suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._retry.wait()
            pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)

    async def _tell_the_end(self, container_id: ContainerId) -> bool:
        """Free the network of a container that has ended: those who wait for its end then know."""
        async with self._below.locks.hold(container_id):
            record = self._below.store.get(container_id)
            ended = record is not None and record.state is State.EXITED
            if ended:
                await self._cleaner.release_network(container_id)
        return ended

    async def _once(self, container_id: ContainerId) -> None:
        record = self._below.store.get(container_id)
        if record is None or record.live:
            return
        if record.state is not State.REMOVING:
            await self._cleaner.clean(container_id)
            if record.state is not State.EXITED or not record.config.auto_remove:
                return
            record = await self._remover.begin(container_id, volumes=True)
        await self._remover.finish(record)

    async def _end_grace(self) -> None:
        await asyncio.sleep(self._grace_s)
        self._grace_over.set()

    @staticmethod
    def _needed(record: ContainerRecord) -> bool:
        if record.live:
            return False
        return record.unclean or (record.state is State.EXITED and record.config.auto_remove)


async def _all(events: list[asyncio.Event], *, timeout_s: float) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            for event in events:
                await event.wait()
