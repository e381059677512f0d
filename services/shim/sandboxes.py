"""Sandboxes: what holds a pod together while its containers come and go, without a process for it.

A sandbox is a member of the shim (see :mod:`.members`): as long as it is there the process stays,
and containers of its group move in. It holds the network namespace that it was made with open, so
that this outlives whoever made it. ``sandbox.json`` in its bundle says all that there is to know,
and is written before anybody is told; a shim that was re-executed reads it again. With the process
the sandbox ends.
"""

from __future__ import annotations

import asyncio
import os
import time
from contextlib import suppress
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from services.common.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from services.common.frozen import frozen

if TYPE_CHECKING:
    from services.shim.member import Member
    from services.shim.members import Members

FILE = "sandbox.json"


@frozen
class Sandbox:
    """One sandbox; a time of 0 has not come yet."""

    netns_path: str = ""
    created_at_ns: int = 0
    started_at_ns: int = 0
    exited_at_ns: int = 0

    @property
    def ready(self) -> bool:
        """Whether containers may be in it."""
        return bool(self.started_at_ns) and not self.exited_at_ns


class Sandboxes:
    """The sandboxes of one shim.

    Args:
        members: those that can be one.
    """

    def __init__(self, members: Members) -> None:
        self._members = members
        self._ended: dict[str, asyncio.Event] = {}
        self._namespaces: dict[str, int] = {}

    def create(self, sandbox_id: str, netns_path: str) -> None:
        """Make a member a sandbox.

        Raises:
            NotFound: there is no such member.
            AlreadyExists: it is one.
            InvalidArgument: the network namespace cannot be opened.
        """
        member = self._member(sandbox_id)
        if self._read(member) is not None:
            raise AlreadyExists(f"sandbox '{sandbox_id}' already exists")
        self._hold(sandbox_id, netns_path)
        self._write(member, Sandbox(netns_path, time.time_ns()))

    def start(self, sandbox_id: str) -> Sandbox:
        """Let containers in.

        Raises:
            NotFound: there is no such sandbox.
            FailedPrecondition: it was started before.
        """
        sandbox = self.get(sandbox_id)
        if sandbox.started_at_ns:
            raise FailedPrecondition(f"sandbox '{sandbox_id}' was started before")
        started = replace(sandbox, started_at_ns=time.time_ns())
        self._write(self._member(sandbox_id), started)
        return started

    def get(self, sandbox_id: str) -> Sandbox:
        """A sandbox as it is now.

        Raises:
            NotFound: there is none of this id.
        """
        sandbox = self._read(self._member(sandbox_id))
        if sandbox is None:
            raise NotFound(f"sandbox '{sandbox_id}' does not exist")
        return sandbox

    def stop(self, sandbox_id: str) -> None:
        """End a sandbox; does nothing when it has ended. Its containers are not touched."""
        sandbox = self.get(sandbox_id)
        if not sandbox.exited_at_ns:
            self._write(self._member(sandbox_id), replace(sandbox, exited_at_ns=time.time_ns()))
        if (namespace := self._namespaces.pop(sandbox_id, None)) is not None:
            os.close(namespace)
        self._event(sandbox_id).set()

    async def wait(self, sandbox_id: str) -> Sandbox:
        """Return once a sandbox has ended."""
        if not self.get(sandbox_id).exited_at_ns:
            await self._event(sandbox_id).wait()
        return self.get(sandbox_id)

    def keeps(self, member: Member) -> bool:
        """Whether a member is a sandbox that has not ended."""
        sandbox = self._read(member)
        return sandbox is not None and not sandbox.exited_at_ns

    def has(self, member: Member) -> bool:
        """Whether a member is a sandbox, or was one."""
        return self._read(member) is not None

    def resume(self) -> None:
        """Hold the namespaces again, after the process has executed another program."""
        for member in self._members:
            sandbox = self._read(member)
            if sandbox is not None and not sandbox.exited_at_ns:
                with suppress(InvalidArgument):  # its name is gone; containers in it keep it
                    self._hold(member.config.id, sandbox.netns_path)

    def _hold(self, sandbox_id: str, netns_path: str) -> None:
        if not netns_path:
            return
        try:
            namespace = os.open(netns_path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise InvalidArgument(
                f"network namespace {netns_path} of sandbox '{sandbox_id}' cannot be opened: "
                f"{error.strerror}",
                field="netns_path",
            ) from error
        self._namespaces[sandbox_id] = namespace

    def _member(self, sandbox_id: str) -> Member:
        member = self._members.get(sandbox_id)
        if member is None:
            raise NotFound(f"this shim has no sandbox '{sandbox_id}'")
        return member

    def _event(self, sandbox_id: str) -> asyncio.Event:
        return self._ended.setdefault(sandbox_id, asyncio.Event())

    def _read(self, member: Member) -> Sandbox | None:
        found = member.home.bundle.read(FILE)
        return Sandbox(**found) if found else None

    def _write(self, member: Member, sandbox: Sandbox) -> None:
        member.home.bundle.write(FILE, asdict(sandbox))
