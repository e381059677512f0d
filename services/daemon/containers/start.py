"""Starting a container.

    recorded (starting) ─── network namespace, address, ports ─┬─ files · configuration
    snapshot's mounts, user ───────────────────────────────────┘
    · containerd's record · task created · clients coupled · task started · recorded (running)

A start that fails is undone by the same clean-up that follows a run. When containerd goes away
once the task may exist, nothing is undone: the record stays ``starting`` until containerd can be
asked (:mod:`services.daemon.containers.reconcile`), and the caller is told to try again.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import time
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

import structlog

from services.common import tracing
from services.common.errors import (
    Aborted,
    Cancelled,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    TheseusError,
    Unavailable,
    Unimplemented,
)
from services.daemon.containers import outcome, plan
from services.daemon.containers.record import (
    ContainerRecord,
    Endpoint,
    ExitStatus,
    PortMapping,
    State,
)
from services.daemon.containers.rootfs import root_layers
from services.daemon.containers.runtime import NewContainer, Stdio
from services.daemon.spec.request import NetworkMode
from services.daemon.spec.users import resolve_user
from services.daemon.together import both

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine, Sequence

    from services.daemon.containers.below import Below
    from services.daemon.containers.caretaker import Caretaker
    from services.daemon.containers.cleanup import Cleaner
    from services.daemon.containers.oci_runtimes import OciRuntimes
    from services.daemon.containers.reconcile import Reconciler
    from services.daemon.containers.record import ContainerId
    from services.daemon.containers.runtime import RootMount
    from services.daemon.containers.sessions import Sessions
    from services.daemon.networks import network
    from services.daemon.spec.host import HostFacts
    from services.daemon.spec.request import ResolvedUser

    Root = asyncio.Task[tuple[list[RootMount], ResolvedUser]]

log = structlog.get_logger(__name__)

T = TypeVar("T")

COMMAND_CODES = {"COMMAND_NOT_FOUND": 127, "COMMAND_NOT_EXECUTABLE": 126}
_OTHER_FAILURE = 128
_COUPLING_TIMEOUT_S = 1.0
# Failures that say nothing about the container: the same call may go through later.
_PASSING = (Unavailable, DeadlineExceeded, Cancelled, Aborted)
STREAM_URI = "theseus-stream:"


class Starter:
    """Starts containers.

    Args:
        below: what they are made of.
        runtimes: what runs them.
        host: facts of this machine.
        cleaner: undoes what failed.
        reconciler: finds out about starts that were cut off.
        caretaker: looks after runs that have ended already.
        sessions: clients that attached before the start, and are coupled before anything runs.
    """

    def __init__(
        self,
        below: Below,
        *,
        runtimes: OciRuntimes,
        host: HostFacts,
        cleaner: Cleaner,
        reconciler: Reconciler,
        caretaker: Caretaker,
        sessions: Sessions,
    ) -> None:
        self._below = below
        self._runtimes = runtimes
        self._host = host
        self._cleaner = cleaner
        self._reconciler = reconciler
        self._caretaker = caretaker
        self._sessions = sessions

    async def start(self, container_id: ContainerId) -> None:
        """Start a container that was created or has exited; one that runs is left alone.

        Raises:
            NotFound: it was removed meanwhile.
            InvalidArgument: with the reason COMMAND_NOT_FOUND or COMMAND_NOT_EXECUTABLE.
            FailedPrecondition: it is paused or being removed, or a port is in use.
            Unavailable: containerd cannot be reached.
        """
        with self._below.observer.timed("start"):
            async with self._below.locks.hold(container_id):
                record = self._below.store.require(container_id)
                if record.state is State.STARTING:
                    record = await self._reconciler.settle_start(record)
                if record.state is State.RUNNING:
                    return
                if record.state is State.PAUSED:
                    raise FailedPrecondition(
                        "cannot start a paused container, try unpause instead",
                        resource=("container", record.id),
                    )
                await self._cleaner.clean(container_id)
                await self._below.execs.forget(container_id)
                attempt = _Attempt(record, self._below, self._runtimes, self._host, self._sessions)
                async with _under_way(attempt.root()) as root:
                    record = await self._below.store.change(container_id, outcome.starting)
                    self._below.trace("start:recorded")
                    await self._run(record, attempt, root)

    async def _run(self, record: ContainerRecord, attempt: _Attempt, root: Root) -> None:
        try:
            pid = await attempt.run(record, root)
        except TheseusError as error:
            await self._failed(record, error, task_possible=attempt.task_possible)
            raise
        except Exception:
            # A fault of ours, told and logged as such by whoever called; the container has failed.
            fault = Internal("internal error: see the daemon's log")
            await self._failed(record, fault, task_possible=attempt.task_possible)
            raise
        now_ns = time.time_ns()
        started = await self._below.store.change(
            record.id, lambda present: outcome.running(present, pid=pid, started_at_ns=now_ns)
        )
        self._below.observer.started()
        log.info("container started", container_id=record.id, init_pid=pid)
        if not started.live:
            if started.exit is not None:
                self._below.observer.ended(started.exit)
            self._caretaker.tend(record.id)

    async def _failed(
        self, record: ContainerRecord, error: TheseusError, *, task_possible: bool
    ) -> None:
        log.info("container not started", container_id=record.id, error=error.message)
        if isinstance(error, _PASSING) and task_possible:
            self._reconciler.settle_soon(record.id)
            return
        if isinstance(error, _PASSING):
            await self._below.store.change(record.id, outcome.abandoned)
        else:
            code = COMMAND_CODES.get(error.reason, _OTHER_FAILURE)
            status = ExitStatus(code, time.time_ns(), error=error.message)
            await self._below.store.change(record.id, lambda now: outcome.ended(now, status))
        try:
            await self._cleaner.clean(record.id)
        except TheseusError as failure:
            log.warning("start not undone yet", container_id=record.id, error=failure.message)
        # Whatever is left is done in the background; a container made for one run goes.
        self._caretaker.tend(record.id)


class _Attempt:
    """One attempt to start: ``task_possible`` once containerd may have made a task."""

    def __init__(
        self,
        record: ContainerRecord,
        below: Below,
        runtimes: OciRuntimes,
        host: HostFacts,
        sessions: Sessions,
    ) -> None:
        self._sessions = sessions
        self.task_possible = False
        self._record = record
        self._below = below
        self._runtimes = runtimes
        self._host = host

    async def run(self, record: ContainerRecord, looked_up: Root) -> int:
        """Make and start the task of a container that is recorded as starting; returns init's pid.

        Args:
            record: as it is recorded.
            looked_up: what :meth:`root` finds.
        """
        below, self._record = self._below, record
        program = self._runtimes.program(record.config.runtime)
        netns_path, (root, user) = await both(self._connect(), looked_up)
        below.trace("start:connected")
        spec = await self._specification(netns_path, user)
        new = NewContainer(
            record.id,
            image=record.image.reference,
            spec=spec,
            snapshotter=below.snapshotter,
            labels={"theseus.container.name": record.name},
            runtime=program,
        )
        below.init_processes.remember(record, spec["process"])
        if not self._sessions.expected(record.id):  # who waits is coupled before anything runs
            self.task_possible = True
            with suppress(Unimplemented):  # containerd is of an older version
                pid = await below.tasks.run(new, rootfs=root, stdio=self._stdio())
                below.trace("start:started")
                return pid
            self.task_possible = False
        return await self._by_steps(new, root)

    async def _by_steps(self, new: NewContainer, root: Sequence[RootMount]) -> int:
        below = self._below
        await below.containers.put(new)
        below.trace("start:record")
        self.task_possible = True
        await below.tasks.create(new.id, rootfs=root, stdio=self._stdio(), runtime=new.runtime)
        below.trace("start:task")
        await self._sessions.couple(new.id, timeout_s=_COUPLING_TIMEOUT_S)
        pid = await below.tasks.start(new.id)
        below.trace("start:started")
        return pid

    async def _connect(self) -> str:
        """Attach to the bridge; returns the path of the namespace, empty where there is none."""
        below, record = self._below, self._record
        if plan.network_mode(record.config) is not NetworkMode.BRIDGE:
            return ""
        path = below.netns_directory / record.id
        with tracing.span("network attach"):
            await below.network.attach(
                record.id, path, plan.network_ports(record.config.ports), chosen=self._place
            )
        return str(path)

    async def _place(self, endpoint: network.Endpoint) -> None:
        self._record = await self._below.store.change(
            self._record.id,
            lambda present: dataclasses.replace(
                present, endpoints=(_endpoint(endpoint),), ports=_ports(endpoint.ports)
            ),
        )

    async def root(self) -> tuple[list[RootMount], ResolvedUser]:
        """The snapshot's mounts, and the user in it; nothing is changed."""
        mounts = await self._below.snapshots.mounts(self._record.id)
        wanted = self._record.config.user or self._record.image.config.user
        user = await asyncio.to_thread(lambda: resolve_user(root_layers(mounts), wanted))
        return mounts, user

    async def _specification(self, netns_path: str, user: ResolvedUser) -> dict[str, Any]:
        below, record = self._below, self._record
        mounts = [await below.volumes.resolve(plan.volume_mount(m)) for m in record.mounts]
        name = plan.hostname(record, os.uname().nodename)
        host_network = plan.network_mode(record.config) is NetworkMode.HOST
        address = record.endpoints[0].ip_address if record.endpoints else ""

        def build() -> dict[str, Any]:
            below.files.create(record.id)
            files = below.files.write(
                record.id, hostname=name, address=address, host_network=host_network
            )
            return plan.specification(
                record,
                self._host,
                user=user,
                name=name,
                netns_path=netns_path,
                mounts=mounts,
                files=files,
            )

        return await asyncio.to_thread(build)

    def _stdio(self) -> Stdio:
        path = quote(str(self._below.files.log_path(self._record.id)))
        uri = f"theseus-log://{path}?format=json-file"
        config = self._record.config
        return Stdio(
            stdin=STREAM_URI if config.open_stdin else "",
            stdout=uri,
            stderr="" if config.tty else uri,
            terminal=config.tty,
        )


@asynccontextmanager
async def _under_way(work: Coroutine[Any, Any, T]) -> AsyncIterator[asyncio.Task[T]]:
    """Do something beside the block, which may take its result; it ends with the block."""
    task = asyncio.create_task(work)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _endpoint(endpoint: network.Endpoint) -> Endpoint:
    return Endpoint(
        network=endpoint.network,
        ip_address=str(endpoint.ip),
        prefix_length=endpoint.prefix_length,
        gateway=str(endpoint.gateway),
        mac_address=endpoint.mac,
    )


def _ports(ports: Sequence[network.PortMapping]) -> tuple[PortMapping, ...]:
    return tuple(PortMapping(**dataclasses.asdict(port)) for port in ports)
