"""One shim as containerd knows it: who it is, how it stands, and who waits for that to change.

    STARTING ──▶ REACHABLE ───▶ REGISTERED          created by us, serves; its stream stands
                                    │ stream broke
    (start) ─────▶ EXPECTED ◀───────┘
                     │ grace time over
                     ▼
                  ADOPTING ──▶ REACHABLE            it answered when dialled
                     └───────▶ SILENT               its process lives and does not answer
    any, its process ended ──▶ REPLACING ──▶ REACHABLE    a successor has adopted the container
                                  └─────────▶ BURYING ──▶ GONE
    any, its task deleted ───▶ REMOVING ─▶ REMOVED
    any, a new stream ───────▶ REGISTERED

A call to a shim that is EXPECTED, ADOPTING, REPLACING or BURYING waits: one of the others follows
within the grace time and a little. A GONE shim still answers (see :mod:`.gone`), until its task is
deleted.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from enum import Enum
from typing import TYPE_CHECKING, Any

from services.common.errors import Unavailable
from services.containerd.tasks.shim import TaskNotFound

if TYPE_CHECKING:
    from collections.abc import Mapping

    from services.containerd.tasks.bundle import Bundle
    from services.containerd.tasks.line import ShimLine
    from services.containerd.tasks.processes import ProcessId
    from services.containerd.tasks.registration import ShimSession
    from services.containerd.tasks.sandbox import SandboxEnd
    from services.containerd.tasks.shim import ProcessExit, ProcessState, Shim


class Standing(Enum):
    """How a shim stands; see the module's drawing."""

    STARTING = "starting"
    REACHABLE = "reachable"
    REGISTERED = "registered"
    EXPECTED = "expected"
    ADOPTING = "adopting"
    SILENT = "silent"
    REPLACING = "replacing"
    BURYING = "burying"
    GONE = "gone"
    REMOVING = "removing"
    REMOVED = "removed"


_ANSWERING = frozenset({Standing.REACHABLE, Standing.REGISTERED, Standing.GONE})
_UNSETTLED = frozenset({Standing.EXPECTED, Standing.ADOPTING, Standing.REPLACING, Standing.BURYING})


class KnownShim:
    """One shim. Only the event loop touches it.

    Attributes:
        bundle: its place.
        instance_id: of the bundle.
        binary: the program of a shim that others wrote; empty: it is ours.
        is_sandbox: it holds a sandbox, and no task of its id.
        end_told: the sandbox' end is in the journal.
        sandbox_end: how the sandbox ended, once it was shut down.
        inherited: it was there when this containerd started.
        group: whose shims share a process; empty: none.
        process: the shim itself, once known; it may be that of others too.
        watch: what sees that process end.
        joining: the process that is being asked to serve it.
        address: where it serves, once known.
        version: of its program, once known.
        line: the one on which its process was asked to be a shim; None: it did not wait for that.
        shim: the way to it, once it serves.
        session: its registration stream, while that stands.
        exits: how its processes ended, by exec id, as far as containerd was told.
        removal: held by whoever removes it.
        dismissed: the note of its deletion, once its task is deleted and it is on its way out.
        is_marked: that is on record in the bundle.
        deletion_told: set once the journal has its ``/tasks/delete``.
    """

    def __init__(self, bundle: Bundle, instance_id: str, standing: Standing) -> None:
        self.bundle = bundle
        self.instance_id = instance_id
        self.binary = ""
        self.is_sandbox = False
        self.end_told = False
        self.sandbox_end: SandboxEnd | None = None
        self.inherited = standing is not Standing.STARTING
        self.group = ""
        self.process: ProcessId | None = None
        self.watch: asyncio.Task[None] | None = None
        self.joining: ProcessId | None = None
        self.address = ""
        self.version = ""
        self.line: ShimLine | None = None
        self.shim: Shim | None = None
        self.session: ShimSession | None = None
        self.exits: dict[str, ProcessExit] = {}
        self._state: ProcessState | None = None
        self._state_changes = 0
        self.removal = asyncio.Lock()
        self.dismissed: Mapping[str, Any] | None = None
        self.is_marked = False
        self.deletion_told = asyncio.Event()
        self.replaced_at: list[float] = []
        self._standing = standing
        self._changed = asyncio.Event()

    @property
    def namespace(self) -> str:
        """containerd's namespace."""
        return self.bundle.namespace

    @property
    def id(self) -> str:
        """The container's id."""
        return self.bundle.id

    @property
    def standing(self) -> Standing:
        """How it stands now."""
        return self._standing

    def turn(self, standing: Standing) -> None:
        """Change how it stands, and wake who waits for that."""
        self._standing = standing
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def change(self, *, timeout_s: float | None = None) -> None:
        """Return after the next change, or after the time limit."""
        changed = self._changed
        try:
            async with asyncio.timeout(timeout_s):
                await changed.wait()
        except TimeoutError:
            return

    async def told_deletion(self, *, within_s: float) -> bool:
        """Whether the shim's word that its task is deleted is in the journal, given some time.

        What does not come within the time is read from its spool by the removal.
        """
        if self.session is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(within_s):
                    await self.deletion_told.wait()
        return self.deletion_told.is_set()

    async def state(self) -> ProcessState:
        """State of init, from its shim if need be.

        A shim whose stream stands tells of every change, so one that was asked, or has said Hello,
        need not be asked again before an event comes.

        Raises:
            TheseusError: as :meth:`ready`, and what the shim answers.
        """
        shim = await self.ready()
        if self._state is not None and self._standing is Standing.REGISTERED:
            return self._state
        changes = self._state_changes
        state = await shim.state("")
        if changes == self._state_changes and self.session is not None:
            self._state = state
        return state

    def remember_state(self, state: ProcessState | None) -> None:
        """Take in what the shim says of init on its own account."""
        self.forget_state()
        self._state = state

    def forget_process(self) -> None:
        """It is nobody's shim any more, and its process may be another's."""
        self.process = None
        if self.watch is not None and self.watch is not asyncio.current_task():
            self.watch.cancel()

    def forget_state(self) -> None:
        """The state of init is another one, or may be."""
        self._state = None
        self._state_changes += 1

    async def settled(self) -> None:
        """Return once it is neither expected nor being adopted or buried."""
        while self._standing in _UNSETTLED:
            await self.change()

    async def ready(self) -> Shim:
        """The way to the shim, once it is settled.

        Raises:
            TaskNotFound: there is no task yet, or no more.
            Unavailable: its process lives, and does not answer.
        """
        await self.settled()
        if self._standing is Standing.SILENT:
            raise Unavailable(
                f"the shim of task '{self.id}' {_pid_text(self.process)} is alive and does not "
                "answer; containerd keeps asking, so try again later",
                retry_after_s=1.0,
            )
        if self._standing not in _ANSWERING or self.shim is None:
            raise TaskNotFound(
                f"task '{self.id}' not found in namespace '{self.namespace}'",
                resource=("task", self.id),
            )
        return self.shim


def _pid_text(process: ProcessId | None) -> str:
    return "" if process is None else f"(pid {process.pid})"
