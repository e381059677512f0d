"""The register of shims: which there are, who has registered, and the way to each of them.

At start the state directory names the shims to expect; what becomes of those that do not come is
:mod:`.keeper`'s business. How a single shim stands is :mod:`.known`'s, its stream of events
:mod:`.registration`'s, and how it ends :mod:`.undertaker`'s.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import structlog

from services.common import linux
from services.common.background import Background
from services.common.errors import AlreadyExists, Unavailable
from services.common.frozen import frozen
from services.containerd.tasks.foreign import left_address
from services.containerd.tasks.gone import GoneShim
from services.containerd.tasks.inheritance import look_around
from services.containerd.tasks.keeper import Keeper
from services.containerd.tasks.known import KnownShim, Standing
from services.containerd.tasks.processes import ProcessId
from services.containerd.tasks.registration import (
    Hello,
    ShimSession,
    Welcome,
    check_hello,
    check_identity,
    note_events,
)
from services.containerd.tasks.scrape import scrape
from services.containerd.tasks.sharing import Sharing
from services.containerd.tasks.shim import ShimRequest, TaskNotFound
from services.containerd.uninterrupted import uninterrupted

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import TracebackType

    from services.containerd.tasks.bundle import Bundles, ShimRecord
    from services.containerd.tasks.factory import ShimLauncher
    from services.containerd.tasks.inheritance import FoundBundle
    from services.containerd.tasks.journal import ShimEvent, TaskJournal
    from services.containerd.tasks.metrics import TaskMetrics
    from services.containerd.tasks.shim import ShimAddress, ShimConnector
    from services.containerd.tasks.undertaker import Undertaker
    from services.containerd.typed import TypedValue

log = structlog.get_logger(__name__)

_LEAVE_S = 2.0
_TOLD_S = 1.0


@frozen
class Identity:
    """Who this run of containerd is, for shims: a random id, and a number that grows."""

    containerd_id: str
    epoch: int


class ShimManager:
    """Knows every shim of this containerd. ``async with`` loads them, and lets go of them.

    Args:
        bundles: where they are.
        journal: for events.
        undertaker: for those that end.
        connect: makes the way to a shim.
        metrics: counts.
        identity: for Welcome.
        grace_s: how long a shim has to register.
        launcher: starts successors of shims that died; None: they have none.
        containers_per_shim: how many containers without a group one process serves.
        met: called when a shim serves that was asked for.
    """

    def __init__(
        self,
        *,
        bundles: Bundles,
        journal: TaskJournal,
        undertaker: Undertaker,
        connect: ShimConnector,
        metrics: TaskMetrics,
        identity: Identity,
        grace_s: float = 5.0,
        launcher: ShimLauncher | None = None,
        containers_per_shim: int = 1,
        met: Callable[[], None] = lambda: None,
    ) -> None:
        self._met = met
        self._launcher = launcher
        self._bundles = bundles
        self._journal = journal
        self._undertaker = undertaker
        self._metrics = metrics
        self._identity = identity
        self._shims: dict[tuple[str, str], KnownShim] = {}
        self._background = Background()
        self._keeper = Keeper(
            background=self._background,
            journal=journal,
            undertaker=undertaker,
            connect=connect,
            metrics=metrics,
            remove=self.remove,
            grace_s=grace_s,
            replace=self._replace if launcher is not None else None,
        )
        self._sharing = Sharing(
            self._shims.values,
            find_way=self._keeper.find_way,
            meet=self._meet,
            most=containers_per_shim,
        )
        self._boot_id = linux.boot_id()
        self._draining = False
        self._leaving: set[asyncio.Task[Any]] = set()

    async def __aenter__(self) -> Self:
        for found in await look_around(self._bundles, self._journal):
            self._inherit(found)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.drain()
        self._background.hurry()
        if self._leaving:  # what is cut off here is found by the next start
            await asyncio.wait(self._leaving, timeout=_LEAVE_S)
        await self._background.stop()
        for known in self._shims.values():
            if known.shim is not None:
                await known.shim.close()

    async def returned(self, limit_s: float) -> None:
        """Wait until no shim is expected any more, at most ``limit_s``."""
        with suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                for known in list(self._shims.values()):
                    while known.standing is Standing.EXPECTED:
                        await known.change(timeout_s=limit_s)

    def drain(self) -> None:
        """Take no more registrations, and end those that stand: a successor is coming."""
        self._draining = True
        for known in self._shims.values():
            if known.session is not None:
                known.session.end(_draining())

    def get(self, namespace: str, container_id: str) -> KnownShim:
        """The shim of a container's task.

        Raises:
            TaskNotFound: it has none.
        """
        known = self._shims.get((namespace, container_id))
        if known is None or known.standing is Standing.STARTING:
            raise TaskNotFound(
                f"task '{container_id}' not found in namespace '{namespace}'",
                resource=("task", container_id),
            )
        return known

    def all(self, namespace: str) -> list[KnownShim]:
        """Every shim of a namespace that has a task, by id."""
        return [
            known
            for (owner, _), known in sorted(self._shims.items())
            if owner == namespace and known.standing is not Standing.STARTING
        ]

    async def begin(
        self,
        namespace: str,
        container_id: str,
        spec: bytes,
        binary: str = "",
        *,
        sandbox: str = "",
    ) -> KnownShim:
        """Make the bundle of a new task; its shim is STARTING until ``began`` or ``remove``.

        Args:
            namespace: the container's.
            container_id: the container's.
            spec: for config.json.
            binary: the program of a shim that others wrote; empty: it is one of ours.
            sandbox: the sandbox that the container belongs to, or its own id: it is one.

        Raises:
            AlreadyExists: the container has a task, or one is being made or deleted.
            InvalidArgument: as ``Bundles.create``.
        """
        key = (namespace, container_id)
        if (leaving := self._shims.get(key)) is not None and leaving.dismissed is not None:
            await uninterrupted(self.remove(leaving))
        if key in self._shims:
            raise AlreadyExists(
                f"task '{container_id}' already exists in namespace '{namespace}': delete it first",
                resource=("task", container_id),
            )
        bundle = self._bundles.find(namespace, container_id)
        known = self._shims[key] = KnownShim(bundle, "", Standing.STARTING)
        try:
            record = await uninterrupted(
                asyncio.to_thread(
                    self._bundles.create, namespace, container_id, spec, binary, sandbox
                )
            )
        except asyncio.CancelledError:  # it may be there by now
            await uninterrupted(asyncio.to_thread(bundle.remove))
            del self._shims[key]
            raise
        except Exception:
            del self._shims[key]
            raise
        known.instance_id = record.instance_id
        known.group = record.group
        known.binary = binary
        known.is_sandbox = sandbox == container_id
        return known

    async def start(
        self,
        launcher: ShimLauncher,
        known: KnownShim,
        options: TypedValue | None = None,
        *,
        ahead: bool = False,
    ) -> None:
        """Have a shim serve a new task: a process of its own, or one of its group.

        Args:
            launcher: starts one.
            known: the new task's.
            options: the runtime's, for a shim that others wrote; such find their group themselves.
            ahead: return as soon as it can be called; a call that fails may have to ask its line.

        Raises:
            ShimStartFailed, DeadlineExceeded, Unavailable: there is none.
        """
        if known.binary:
            request = replace(self._request(known), options=options)
            self._meet(known, await launcher.start_shim(request))
        else:
            request = replace(self._request(known), ahead=ahead)
            await self._sharing.start(launcher, known, request)

    def began(self, known: KnownShim) -> None:
        """The task of a new shim exists."""
        known.turn(Standing.REACHABLE if known.session is None else Standing.REGISTERED)
        self._keeper.check(known)

    async def forwarded(self, namespace: str, container_id: str, event: ShimEvent) -> bool:
        """Take in an event that a shim which others wrote has published, as it has no stream.

        Returns:
            False if no such shim runs that container; nothing is done.
        """
        known = self._shims.get((namespace, container_id))
        if known is None or not known.binary or not known.instance_id:
            return False
        await self._journal.forward(namespace, known.instance_id, event)
        note_events(known, [event], self._journal)
        return True

    async def register(self, hello: Hello) -> tuple[Welcome, ShimSession]:
        """Take in a shim that says Hello; ends the session that it had before.

        Raises:
            InvalidArgument, FailedPrecondition: as ``check_hello``.
            NotFound: there is no such bundle here.
            Unavailable: this containerd is about to end.
        """
        if self._draining:
            raise _draining()
        check_hello(hello, boot_id=self._boot_id)
        known = check_identity(hello, self._shims.get((hello.namespace, hello.id)))
        progress = await self._journal.progress(hello.instance_id)
        check_identity(hello, known)  # it may have been given up meanwhile
        session = ShimSession(known, self._journal, progress=progress, closed=self._session_closed)
        if known.session is not None:
            known.session.replace()
        self._enrol(known, session, hello)
        return Welcome(self._identity.containerd_id, self._identity.epoch, progress), session

    async def dismiss(self, known: KnownShim, note: Mapping[str, Any], *, told: bool) -> None:
        """Let the shim of a deleted task go; returns once that cannot get lost any more.

        By then its events are in the journal where it can deliver them. That it tells of the
        deletion is the record of its removal until ``deleting`` is written; what has not told so
        has that now. The removal goes on by itself; a new task of the same id waits for its end.

        Args:
            known: the shim, whose container is deleted.
            note: for the record.
            told: whether it tells of the deletion.
        """
        is_dead = known.standing is Standing.GONE
        known.turn(Standing.REMOVING)
        note = {**note, "clean": True}
        if is_dead or not told or not await known.told_deletion(within_s=_TOLD_S):
            await self._mark(known, note)
        if known.dismissed is not None:  # by another call at the same time
            return
        known.dismissed = note
        if is_dead:  # there is nobody to wait for
            await self.remove(known)
            return
        task = self._background.start_behind(partial(self.remove, known), name=f"remove {known.id}")
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    async def remove(self, known: KnownShim) -> bool:
        """Take a task's shim and bundle away (see ``Undertaker.remove``).

        Returns:
            False if another call has done it meanwhile.
        """
        async with known.removal:
            if known.standing is Standing.REMOVED:
                return False
            known.turn(Standing.REMOVING)
            if not known.is_marked:
                await self._mark(known, known.dismissed or {})
            clean = known.dismissed is not None and bool(known.dismissed.get("clean"))
            shared = bool(self._sharing.company(known))
            try:
                await self._undertaker.remove(known, clean=clean, shared=shared)
            except BaseException:
                if known.line is not None:  # its process is named by what is left
                    known.line.close()
                raise
            if known.session is not None:
                known.session.end()
            del self._shims[known.namespace, known.id]
            known.turn(Standing.REMOVED)
            known.forget_process()
            if known.line is not None:
                known.line.release()  # only now: nothing names its process any more
            return True

    async def _mark(self, known: KnownShim, note: Mapping[str, Any]) -> None:
        await self._undertaker.mark(known, note)
        known.is_marked = True

    async def scrape(self, *, timeout_s: float = 0.8) -> bytes:
        """The metrics of all shims in one page; those that do not answer in time are counted.

        A process that serves several is asked once, and stands under the first one's id.
        """
        standing = dict.fromkeys(Standing, 0)
        for known in self._shims.values():
            standing[known.standing] += 1
        for kind, count in standing.items():
            self._metrics.known.labels(kind.value).set(count)
        shims = {
            known.address: (known.namespace, known.id, known.shim)
            for _, known in sorted(self._shims.items(), reverse=True)
            if known.shim is not None
        }
        page, unanswered = await scrape(list(shims.values()), timeout_s=timeout_s)
        self._metrics.unanswered.inc(unanswered)
        return page

    def _request(self, known: KnownShim, *, adopt: bool = False) -> ShimRequest:
        return ShimRequest(
            namespace=known.namespace,
            id=known.id,
            bundle=known.bundle.path,
            socket=self._bundles.socket(known.namespace, known.id, known.instance_id),
            instance_id=known.instance_id,
            adopt=adopt,
        )

    def _meet(self, known: KnownShim, address: ShimAddress) -> None:
        self._keeper.meet(known, address.process, address.address, address.version, address.line)
        self._met()

    async def _replace(self, known: KnownShim) -> ShimAddress:
        assert self._launcher is not None
        dead = known.address
        found = await self._sharing.start(self._launcher, known, self._request(known, adopt=True))
        if dead != found.address:  # it found others of its group; the dead shim served elsewhere
            _unlink(dead)
        return found

    def _inherit(self, found: FoundBundle) -> None:
        bundle = found.bundle
        instance_id = found.record.instance_id if found.record is not None else ""
        known = KnownShim(bundle, instance_id, Standing.EXPECTED)
        known.group = found.record.group if found.record is not None else ""
        known.binary = found.record.binary if found.record is not None else ""
        known.is_sandbox = found.record is not None and found.record.sandbox == bundle.id
        self._shims[bundle.namespace, bundle.id] = known
        name = f"shim {bundle.id}"
        if found.record is None or found.deletion is not None:
            log.info("removal of a task goes on", namespace=bundle.namespace, container=bundle.id)
            known.dismissed = found.deletion or {}
            self._recognise(known, found.record)
            self._background.start(self.remove(known), name=name)
        elif found.epitaph is not None:
            known.shim = GoneShim(found.epitaph)
            known.turn(Standing.GONE)
        elif found.record.boot_id != self._boot_id:
            self._background.start(self._keeper.settle_void(known), name=name)
        else:
            self._expect_inherited(known, found.record)

    def _recognise(self, known: KnownShim, record: ShimRecord | None) -> None:
        """Learn who the shim of a deleted task is: others that it serves must not go with it."""
        if record is None or not record.pid or record.boot_id != self._boot_id:
            return
        known.process = ProcessId(record.pid, record.start_time)
        self._keeper.find_way(known, record.address or f"unix://{record.socket}")

    def _expect_inherited(self, known: KnownShim, record: ShimRecord) -> None:
        address = f"unix://{record.socket}"
        if record.binary:
            address = record.address or left_address(known.bundle)
        if not address:
            # containerd ended before the program that starts the shim did.
            self._background.start(self.remove(known), name=f"remove {known.id}")
            return
        if record.pid:
            self._keeper.meet(known, ProcessId(record.pid, record.start_time), address, "")
        else:
            self._keeper.find_way(known, address)
        self._background.start(self._keeper.expect(known), name=f"expect {known.id}")

    def _enrol(self, known: KnownShim, session: ShimSession, hello: Hello) -> None:
        known.session = session
        self._metrics.registrations.inc()
        self._keeper.meet(
            known, ProcessId(hello.pid, hello.start_time), hello.address, hello.version
        )
        known.forget_state()
        for process in hello.processes:
            if not process.exec_id:
                known.remember_state(process.state())
            if process.exit is not None:
                known.exits[process.exec_id] = process.exit
        if known.standing in (Standing.STARTING, Standing.REPLACING, Standing.REMOVING):
            return
        if known.inherited and not hello.processes and not known.is_sandbox:
            # containerd ended while it made this task: nobody was ever told of it.
            log.warning("shim without a task is removed", namespace=known.namespace, id=known.id)
            self._metrics.settled.labels("removed").inc()
            self._background.start(self.remove(known), name=f"remove {known.id}")
            return
        if known.standing is not Standing.REACHABLE:
            self._metrics.settled.labels("registered").inc()
            log.info("shim registered", namespace=known.namespace, container=known.id)
        known.inherited = False
        known.turn(Standing.REGISTERED)

    def _session_closed(self, session: ShimSession) -> None:
        known = session.known
        if known.session is not session:
            return
        known.session = None
        known.forget_state()
        if known.standing is Standing.REGISTERED and not self._draining:
            known.turn(Standing.EXPECTED)
            self._background.start(self._keeper.expect(known), name=f"expect {known.id}")


def _draining() -> Unavailable:
    return Unavailable("containerd is being replaced: register again")


def _unlink(address: str) -> None:
    Path(address.removeprefix("unix://")).unlink(missing_ok=True)
