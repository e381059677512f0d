"""Cleaning up after a run: what containerd, the network and the kernel still have of it.

    network detached · sessions told · task deleted · containerd's record deleted · recorded (clean)

Each step may be repeated, so a clean-up that was cut off is simply done again. Until it is done the
record says ``unclean``, and a start or a removal does it first. What needs containerd waits until
containerd is there.
"""

from __future__ import annotations

import dataclasses
from contextlib import suppress
from typing import TYPE_CHECKING

import structlog

from services.common.errors import FailedPrecondition, NotFound, TheseusError
from services.daemon.containers.record import State

if TYPE_CHECKING:
    from services.daemon.containers.below import Below
    from services.daemon.containers.record import ContainerId, ContainerRecord
    from services.daemon.containers.sessions import Sessions

log = structlog.get_logger(__name__)

_SIGKILL = 9
_KILL_TIMEOUT_S = 10.0
_SESSIONS_TIMEOUT_S = 2.0


class Cleaner:
    """Cleans up. The caller holds the container's operation lock.

    Args:
        below: what containers are made of.
        sessions: attached clients, who get the rest of the output before the shim goes.
    """

    def __init__(self, below: Below, sessions: Sessions) -> None:
        self._below = below
        self._sessions = sessions

    async def clean(self, container_id: ContainerId) -> None:
        """Do all steps for a container that has no process any more, or whose start failed.

        Raises:
            Unavailable: containerd cannot be reached; what it has is left for later.
        """
        below = self._below
        record = below.store.get(container_id)
        if record is None or not record.unclean:
            return
        await self.release_network(container_id)
        below.trace("clean:network")
        await self._sessions.finish(container_id, timeout_s=_SESSIONS_TIMEOUT_S)
        await self._delete_task(container_id)
        below.trace("clean:task")
        await below.containers.delete(container_id)
        below.trace("clean:record")
        if record.state is State.REMOVING:  # its record goes; until then all this may be repeated
            return

        def clean(present: ContainerRecord) -> ContainerRecord | None:
            return None if present.live else dataclasses.replace(present, unclean=False)

        await below.store.change(container_id, clean)

    async def release_network(self, container_id: ContainerId) -> None:
        """Give the container's address and ports back; those who wait for its end then know.

        A network that refuses is logged, and tried again by the next clean-up.
        """

        async def told() -> None:
            record = self._below.store.get(container_id)
            if record is not None and (record.endpoints or record.ports):
                await self._below.store.change(container_id, _without_place)

        try:
            await self._below.network.detach(container_id, given_back=told)
        except TheseusError as error:
            log.warning("network not detached", container_id=container_id, error=error.message)
            await told()

    async def _delete_task(self, container_id: ContainerId) -> None:
        try:
            await self._below.tasks.delete(container_id)
        except FailedPrecondition:
            # It runs, although nobody wanted it to: a start that failed half-way.
            await self._kill(container_id)
            await self._below.tasks.delete(container_id)

    async def _kill(self, container_id: ContainerId) -> None:
        log.warning("leftover task killed", container_id=container_id)
        with suppress(NotFound):  # it ended by itself
            await self._below.tasks.kill(container_id, _SIGKILL)
            await self._below.tasks.wait_end(container_id, timeout_s=_KILL_TIMEOUT_S)


def _without_place(record: ContainerRecord) -> ContainerRecord:
    return dataclasses.replace(record, endpoints=(), ports=())
