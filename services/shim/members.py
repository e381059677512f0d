"""The members of one shim, and how they come and go.

The first is there from the shim's birth; containerd asks for others (``Control.Host``) and has each
of them leave (``Control.Leave``) once its container is deleted. With the last one the shim ends.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import structlog

from services.common.errors import AlreadyExists, FailedPrecondition, InvalidArgument, TheseusError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from services.shim.config import ShimConfig
    from services.shim.home import Home
    from services.shim.member import Member
    from services.shim.tasks import Tasks

log = structlog.get_logger(__name__)

_STDERR = 2


class Members:
    """Members by the id of their container; none before the shim knows which one it is.

    Args:
        make: makes one.

    Attributes:
        joined: how many there have been.
    """

    def __init__(self, make: Callable[[ShimConfig], Member]) -> None:
        self._make = make
        self._members: dict[str, Member] = {}
        self.joined = 0

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[Member]:
        return iter(list(self._members.values()))

    @property
    def namespace(self) -> str:
        """containerd's, which is that of all of them."""
        return self.first.config.namespace

    @property
    def first(self) -> Member:
        """The one that has been there for longest; there always is one until the shim ends."""
        return next(iter(self._members.values()))

    def get(self, container_id: str) -> Member | None:
        """The member of this id."""
        return self._members.get(container_id)

    def add(self, config: ShimConfig) -> Member:
        """Make a member."""
        member = self._members[config.id] = self._make(config)
        self.joined += 1
        return member

    def remove(self, member: Member) -> None:
        """Let go of one."""
        self._members.pop(member.config.id, None)

    def home_of(self, container_id: str) -> Home:
        """Where a new container belongs: with the member of its name, or else with the first."""
        member = self._members.get(container_id, self.first)
        member.fresh = False
        return member.home

    async def delivered(self) -> None:
        """Wait until every event of every member is acknowledged."""
        while any(len(member.spool) for member in self):
            for member in self:
                await member.spool.emptied()

    def pack(self) -> dict[str, Any]:
        """What the next image of the process has to know: as of one member, and the others."""
        first, *further = self
        packed = first.pack()
        return {**packed, "further": [m.pack() for m in further]} if further else packed

    def unpack(self, saved: Mapping[str, Any], read: Callable[[Any], ShimConfig]) -> None:
        """Go on where an earlier image was; the first is there already."""
        self.first.unpack(saved)
        for entry in saved.get("further", ()):
            self.add(read(entry["config"])).unpack(entry)


class Hosting:
    """Takes members in, and sees them off.

    Args:
        members: they.
        tasks: their containers.
        identity: of this process, for their bundles.
    """

    def __init__(
        self, members: Members, tasks: Tasks, identity: Callable[[], dict[str, object]]
    ) -> None:
        self._members = members
        self._tasks = tasks
        self._identity = identity
        self._turns = asyncio.Lock()
        self.deserted = asyncio.Event()

    async def host(self, config: ShimConfig) -> None:
        """Serve one more bundle; with ``config.adopt``, what another process has left of it.

        Does nothing when it is served already, so that it may be asked again.

        Raises:
            FailedPrecondition: the shim is about to end, or there is nothing to take over.
            InvalidArgument: it is of another namespace.
            AlreadyExists: another bundle has this id here.
        """
        if config.namespace != self._members.namespace:
            raise InvalidArgument(
                f"this shim serves namespace '{self._members.namespace}', not '{config.namespace}'",
                field="namespace",
            )
        # To its end, whatever becomes of the caller, who may ask again.
        await self._tasks.to_the_end(self._host(config))

    async def leave(self, container_id: str, *, now: bool) -> None:
        """See a member off, once its events are acknowledged; ``now``: as it stands.

        Does nothing when there is none of this id, so that it may be asked again.

        Raises:
            FailedPrecondition: it has a container, and it does not have to be ``now``.
            TimeoutError: its container does not die.
        """
        member = self._members.get(container_id)
        if member is None:
            return
        if now:
            await self._tasks.destroy(container_id)
        elif self._tasks.at(member.home):
            raise FailedPrecondition(
                f"container '{container_id}' is not deleted: its shim has to stay"
            )
        else:
            await member.spool.emptied()
        await self._tasks.forgotten(container_id)
        if self._members.get(container_id) is not member:  # another call saw it off meanwhile
            return
        last = len(self._members) == 1
        if not last:
            self._members.remove(member)
            self._keep_log(member.config.bundle)
        await member.leave()
        log.info("member left", container_id=container_id, members=len(self._members))
        if last:
            self.deserted.set()

    async def _host(self, config: ShimConfig) -> None:
        async with self._turns:
            known = self._members.get(config.id)
            if known is not None and known.config.instance_id == config.instance_id:
                return
            if known is not None:
                raise AlreadyExists(
                    f"the shim serves another bundle of id '{config.id}': {known.config.bundle}",
                    resource=("shim", config.id),
                )
            if self._tasks.shutdown.is_set() or self.deserted.is_set():
                raise FailedPrecondition("the shim is about to end and takes nothing more in")
            member = self._members.add(config)
            try:
                await self._move_in(member)
            except (TheseusError, OSError):
                self._members.remove(member)
                member.keeping.close()
                raise
            member.keeping.open()
            member.register()
        log.info("member taken in", container_id=config.id, adopted=config.adopt)

    async def _move_in(self, member: Member) -> None:
        if member.config.adopt:
            containers = self._tasks.unpack(await member.read_legacy())
            self._tasks.save(member.home)
            for container in containers:
                container.resume_io()
        member.write_identity(self._identity())

    def _keep_log(self, left: Path) -> None:
        """Log into another member's bundle, if it was that of the one that has left."""
        with suppress(OSError):
            if not os.path.samestat((left / "shim.log").stat(), os.fstat(_STDERR)):
                return
            path = self._members.first.config.bundle / "shim.log"
            fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
            os.dup2(fd, _STDERR)
            os.close(fd)
