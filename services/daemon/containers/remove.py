"""Removing a container: steps that can be repeated, and are resumed after a crash.

    recorded (removing, tombstone) · network · volumes ── answered
    · cleaned up · snapshot · files · record

With the first step the container is gone for users, and its name is free: a restart finishes what
is left. What a user could still notice of it (an address, a port, a volume) goes before the answer,
the rest behind it. The record goes last, so whatever is left of a container always has a record
that says what to do.
"""

from __future__ import annotations

import asyncio
import dataclasses
from typing import TYPE_CHECKING

import structlog

from services.common.errors import FailedPrecondition, TheseusError, Unavailable
from services.daemon.containers.outliving import OutlivingWork
from services.daemon.containers.record import ContainerRecord, MountKind, State
from services.daemon.containers.states import Action, after
from services.daemon.metadata import containers as rows
from services.daemon.volumes.store import VolumeInUse

if TYPE_CHECKING:
    from services.common.database import Transaction
    from services.daemon.containers.below import Below
    from services.daemon.containers.cleanup import Cleaner
    from services.daemon.containers.record import ContainerId

log = structlog.get_logger(__name__)


class Remover:
    """Removes containers. For all but :meth:`begin` the caller holds the operation lock.

    Args:
        below: what containers are made of.
        cleaner: does what is left of the last run.
    """

    def __init__(self, below: Below, cleaner: Cleaner) -> None:
        self._below = below
        self._cleaner = cleaner
        self._undoing = OutlivingWork()

    async def begin(self, container_id: ContainerId, *, volumes: bool) -> ContainerRecord:
        """Record that the container is to go; from here on there is no way back.

        Whether it may be is decided inside the transaction: no lock is needed.

        Raises:
            NotFound: it has gone.
            FailedPrecondition: it runs.
        """

        def mark(present: ContainerRecord) -> ContainerRecord | None:
            if present.state is State.REMOVING:  # by a version that kept the name until the end
                return dataclasses.replace(present, name=present.id)
            if present.live:
                raise FailedPrecondition(
                    f"You cannot remove a {present.state} container {present.id}. Stop the "
                    "container before attempting removal or force remove",
                    resource=("container", present.id),
                )
            state = after(present, Action.REMOVE)
            return dataclasses.replace(
                present, state=state, name=present.id, remove_volumes=volumes
            )

        record = await self._below.store.retire(container_id, mark)
        self._below.trace("remove:recorded")
        return record

    async def withdraw(self, record: ContainerRecord) -> None:
        """Take away what users could still notice of a container whose removal has begun.

        Raises:
            TheseusError: a volume cannot be removed.
        """
        await self._cleaner.release_network(record.id)
        self._below.trace("remove:network")
        await self._remove_volumes(record)
        self._below.trace("remove:volumes")

    async def finish(self, record: ContainerRecord) -> None:
        """Do all steps that follow the first.

        Raises:
            TheseusError: a step failed: the container stays in state ``removing``.
        """
        below = self._below
        await self.withdraw(record)
        await self._cleaner.clean(record.id)
        below.trace("remove:clean")
        await below.snapshots.remove(record.id)
        below.trace("remove:snapshot")
        await asyncio.to_thread(below.files.remove, record.id)
        below.trace("remove:files")
        await below.store.bury(record.id)
        below.execs.forget_removed(record.id)
        log.info("container removed", container_id=record.id)

    async def undo_create(self, record: ContainerRecord) -> None:
        """Take away a container whose creation failed, even if the caller is cancelled again."""

        async def undo() -> None:
            try:
                await self.finish(await self.begin(record.id, volumes=True))
            except Unavailable as error:
                log.warning("creation not undone yet", container_id=record.id, error=error.message)
            except TheseusError as error:
                log.error("creation not undone", container_id=record.id, error=error.message)

        await self._undoing.run(undo(), name="undo-create")

    async def close(self) -> None:
        """Wait for what is being undone."""
        await self._undoing.close()

    async def _remove_volumes(self, record: ContainerRecord) -> None:
        below = self._below
        if not any(mount.kind is MountKind.VOLUME for mount in record.mounts):
            return

        def release(present: ContainerRecord) -> ContainerRecord:
            return present

        def release_claims(tx: Transaction) -> None:
            rows.release_volumes(tx, record.id)

        await below.store.change(record.id, release, also=release_claims)
        for mount in record.mounts:
            if mount.kind is not MountKind.VOLUME or not mount.anonymous:
                continue
            if not record.remove_volumes:
                continue
            try:
                await below.volumes.remove(mount.source, users=rows.volume_users, force=True)
            except VolumeInUse:
                log.info("volume kept", volume=mount.source, reason="another container uses it")
