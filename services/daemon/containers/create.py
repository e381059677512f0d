"""Creating a container: a record first, then what belongs to it.

    checked · recorded (creating) · volumes · snapshot, files · copied · recorded (created)

Whatever goes wrong after the record, a cancelled call included, the container is removed again. A
crash leaves a record in state ``creating``, which the next start of the daemon removes.
"""

from __future__ import annotations

import asyncio
import dataclasses
import secrets
import time
from typing import TYPE_CHECKING

import structlog

from services.common.errors import AlreadyExists, FailedPrecondition, NotFound
from services.daemon.containers import names, plan
from services.daemon.containers.record import (
    ContainerConfig,
    ContainerId,
    ContainerRecord,
    Mount,
    MountKind,
    State,
)
from services.daemon.containers.rootfs import readable_root
from services.daemon.containers.states import Action, after
from services.daemon.metadata import containers as rows
from services.daemon.volumes.store import ANONYMOUS_LABEL, validate_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    from services.common.database import Transaction
    from services.daemon.containers.below import Below
    from services.daemon.containers.caretaker import Caretaker
    from services.daemon.containers.oci_runtimes import OciRuntimes
    from services.daemon.containers.remove import Remover
    from services.daemon.containers.runtime import RootMount
    from services.daemon.images.store import ImageStore
    from services.daemon.spec.host import HostFacts
    from services.daemon.volumes.mounts import ResolvedMount

log = structlog.get_logger(__name__)

_NAME_ATTEMPTS = 8


class Creator:
    """Creates containers.

    Args:
        below: what they are made of.
        images: where they come from.
        runtimes: what can run them.
        host: facts of this machine.
        remover: takes half-made ones away.
        caretaker: does so later, where that cannot be done at once.
    """

    def __init__(
        self,
        below: Below,
        *,
        images: ImageStore,
        runtimes: OciRuntimes,
        host: HostFacts,
        remover: Remover,
        caretaker: Caretaker,
    ) -> None:
        self._below = below
        self._images = images
        self._runtimes = runtimes
        self._host = host
        self._remover = remover
        self._caretaker = caretaker

    async def create(
        self, config: ContainerConfig, *, name: str = ""
    ) -> tuple[ContainerRecord, list[str]]:
        """Make a container that is ready to start; returns it with warnings for the user.

        Raises:
            InvalidArgument: a field of ``config``, or the name.
            NotFound: there is no such image.
            AlreadyExists: the name is taken.
            FailedPrecondition: the runtime cannot be used.
        """
        with self._below.observer.timed("create"):
            wanted = names.check_name(name) if name else ""
            self._runtimes.program(config.runtime)
            image = await self._images.for_run(config.image)
            warnings, args = plan.check(config, image.config, self._host)
            mounts = tuple(_named(m) for m in plan.all_mounts(config, image.config))
            record = ContainerRecord(
                id=ContainerId(names.new_id()),
                name=wanted or names.new_name(),
                config=config,
                image=image,
                args=args,
                state=State.CREATING,
                created_at_ns=time.time_ns(),
                mounts=mounts,
            )
            async with self._below.locks.hold(record.id):
                record = await self._record(record, chosen=bool(wanted))
                self._below.trace("create:recorded")
                try:
                    created = await self._furnish(record)
                except BaseException:
                    await self._remover.undo_create(record)
                    self._caretaker.tend(record.id)  # what could not be undone yet
                    raise
        log.info("container created", container_id=created.id, name=created.name)
        return created, warnings

    async def _record(self, record: ContainerRecord, *, chosen: bool) -> ContainerRecord:
        volumes = [m.source for m in record.mounts if m.kind is MountKind.VOLUME]

        def claim(tx: Transaction) -> None:
            for volume in volumes:
                rows.claim_volume(tx, record.id, volume)

        for attempt in range(_NAME_ATTEMPTS):
            try:
                await self._below.store.add(record, also=claim)
            except AlreadyExists:
                if chosen or attempt == _NAME_ATTEMPTS - 1:
                    raise
                record = dataclasses.replace(record, name=names.new_name(attempt))
            else:
                break
        return record

    async def _furnish(self, record: ContainerRecord) -> ContainerRecord:
        below = self._below
        mounts, resolved = await self._make_volumes(record)
        below.trace("create:volumes")
        making = asyncio.create_task(asyncio.to_thread(below.files.create, record.id))
        try:
            root = await self._prepare(record)
        finally:
            await asyncio.wait([making])  # a thread cannot be stopped
        await making
        below.trace("create:furnished")
        await self._copy_up(root, resolved)
        below.trace("create:filled")

        def finish(present: ContainerRecord) -> ContainerRecord:
            state = after(present, Action.FINISH_CREATE)
            return dataclasses.replace(present, state=state, mounts=mounts)

        return await below.store.change(record.id, finish)

    async def _make_volumes(
        self, record: ContainerRecord
    ) -> tuple[tuple[Mount, ...], list[ResolvedMount]]:
        mounts: list[Mount] = []
        resolved: list[ResolvedMount] = []
        for mount in record.mounts:
            if mount.anonymous:
                await self._below.volumes.create(mount.source, labels={ANONYMOUS_LABEL: ""})
            made = await self._below.volumes.resolve(plan.volume_mount(mount))
            resolved.append(made)
            directory = made.source if mount.kind is MountKind.VOLUME else ""
            mounts.append(dataclasses.replace(mount, target=made.target, directory=directory))
        return tuple(mounts), resolved

    async def _prepare(self, record: ContainerRecord) -> list[RootMount]:
        try:
            return await self._below.snapshots.prepare(record.id, record.image.chain_id)
        except NotFound as error:
            raise FailedPrecondition(
                f"image {record.config.image} is not unpacked: pull or load it again",
                resource=("image", record.image.id),
            ) from error

    async def _copy_up(self, root: list[RootMount], resolved: Sequence[ResolvedMount]) -> None:
        """Fill empty volumes with what the image has in their place."""
        wanting = [mount for mount in resolved if mount.volume and mount.copy_up]
        for mount in wanting:
            view = readable_root(root, self._below.scratch)
            place = await asyncio.to_thread(view.__enter__)
            try:
                await self._below.volumes.copy_up(mount.volume, root=place, path=mount.target)
            finally:
                await asyncio.to_thread(view.__exit__, None, None, None)


def _named(mount: Mount) -> Mount:
    """A volume mount with the name of its volume: an anonymous one is given its name here."""
    if mount.kind is not MountKind.VOLUME:
        return mount
    if not mount.source:
        return dataclasses.replace(mount, source=secrets.token_hex(32), anonymous=True)
    validate_name(mount.source)
    return mount
