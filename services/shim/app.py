"""Builds a shim out of its parts and runs it from its birth to its end.

The only file that knows all classes. A shim ends when Shutdown was asked for, or a while after its
last container was deleted, and in both cases only once containerd has acknowledged every event. If
containerd never comes back it stays.

What depends on no process is done before the fork (``Shim``, :meth:`Shim.prepare`), what depends on
no container before the shim is told which one it is (:meth:`Shim.wait`), and what nobody waits for
while the runtime makes the container (``_settle_in``).
"""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import structlog

from protos.containerd.runtime.sandbox.v1 import sandbox_pb2, sandbox_pb2_grpc
from protos.containerd.task.v2 import shim_pb2 as shim_v2_pb2
from protos.containerd.task.v2 import shim_pb2_grpc as shim_v2_pb2_grpc
from protos.containerd.task.v3 import shim_pb2, shim_pb2_grpc
from protos.theseus.shim.v1 import (
    control_pb2,
    control_pb2_grpc,
    registry_pb2,
    streams_pb2,
    streams_pb2_grpc,
)
from services.common import VERSION, linux
from services.common import log as logs
from services.common.background import Background
from services.common.server import Service
from services.shim import handover, packing
from services.shim.clients.events import timestamp
from services.shim.clients.registry import PROTOCOL
from services.shim.config import ShimConfig
from services.shim.member import Member
from services.shim.members import Hosting, Members
from services.shim.reaper import Reaper
from services.shim.reexec import Attempt, Reexecution
from services.shim.rpc.control import ControlService
from services.shim.rpc.gate import Gate
from services.shim.rpc.sandbox import SandboxService
from services.shim.rpc.server import Listener, ShimServer
from services.shim.rpc.streams import StreamsService
from services.shim.rpc.task import TaskService
from services.shim.sandboxes import Sandboxes
from services.shim.tasks import Defaults, Tasks

if TYPE_CHECKING:
    from collections.abc import Callable

    from services.shim.handover import Outgoing
    from services.shim.metrics import ShimMetrics
    from services.shim.process import Process, Status
    from services.shim.reexec import Successor

log = structlog.get_logger(__name__)

_STOP_GRACE_S = 2.0
_SETTLE_IN_S = 0.1
_SETTLED_S = 3.5  # most that live as long are idle then, and few others start; see ``MemoryMerger``
_FINAL_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_TASK = shim_pb2.DESCRIPTOR.services_by_name["Task"]


class Shim:
    """One shim. Make it, in this process or the one that it is a fork of, then ``run`` it.

    Args:
        metrics: counts.
    """

    def __init__(self, metrics: ShimMetrics) -> None:
        self._unwanted: Callable[[], object] = _nothing
        self._has_begun = False
        self._was_dismissed = False
        self._errors = 0
        self._metrics = metrics
        self._reaper = Reaper()
        self._background = Background()
        self._members = Members(self._make_member)
        self._sandboxes = Sandboxes(self._members)
        self._tasks = Tasks(
            reaper=self._reaper, find_home=self._members.home_of, defaults=self._defaults
        )
        self._hosting = Hosting(self._members, self._tasks, self._identity)
        self._gate = Gate()
        self._reexecution = Reexecution(
            gate=self._gate,
            tasks=self._tasks,
            reaper=self._reaper,
            attempt=Attempt(),
            pack=self._pack,
            needs=lambda: handover.format_of(self._members.pack()),
        )
        self._server = self._build_server()
        self._boot_id = linux.boot_id()
        self._start_time = 0

    @property
    def identity(self) -> dict[str, object]:
        """Which process this is, once it waits or runs."""
        return {
            "pid": os.getpid(),
            "start_time": self._start_time,
            "version": VERSION,
            "boot_id": self._boot_id,
        }

    @property
    def without_incident(self) -> bool:
        """Whether it was one container's shim from that one's creation to its deletion.

        And nothing else, and has ended because it was asked to, and complained of nothing.
        """
        return (
            self._was_dismissed
            and self._tasks.created == 1
            and not self._tasks.unfinished
            and self._members.joined == 1
            and not self._members.first.config.adopt
            and not self._sandboxes.has(self._members.first)
            and not self._server.speaks_grpc
            and logs.Logger.errors == self._errors
        )

    async def prepare(self) -> None:
        """Do all that depends on no process."""
        await self._server.prepare(_TASK.full_name, "Create")

    async def wait(self, listener: Listener, *, unwanted: Callable[[], object]) -> None:
        """Do all that depends on no container; calls that come wait until the shim runs.

        Args:
            listener: where they come.
            unwanted: called when a signal ends the process before it runs.
        """
        self._unwanted = unwanted
        self._begin()
        self._reaper.start()
        await self._server.listen(listener)
        await self.prepare()

    async def run(
        self,
        config: ShimConfig,
        serving: Callable[[dict[str, object]], None],
        successor: Successor | None = None,
    ) -> None:
        """Serve until the end.

        Args:
            config: what it is told.
            serving: gets the answer for whoever started the shim.
            successor: of an earlier image of this process, which this one is; None: it is new.

        Raises:
            TheseusError, OSError: it cannot be that shim.
        """
        if not self._has_begun:
            self._begin()
        async with self._background:
            first = self._members.add(config)
            if successor is not None or config.adopt:
                if successor is not None:
                    await self._take_over(successor)
                else:
                    await self._adopt()
                for member in self._members:
                    member.write_identity(self._identity())
                    member.register()
            else:
                self._reaper.start()
                await self._serve()
                self._background.start(self._settle_in(first), name="settle in")
            serving(self._identity())
            await asyncio.sleep(0)  # a call that has waited goes first
            log.info("shim serves", request_id=config.request_id, version=VERSION)
            merging = asyncio.get_running_loop().call_later(_SETTLED_S, packing.offer_to_merge)
            await self._end(config.linger_s)
            merging.cancel()
            self._background.hurry()
            await self._tasks.finish()
            await self._server.stop(_STOP_GRACE_S)
        self._reaper.stop()
        for member in self._members:
            await member.leave()
        log.info("shim ends")

    def _begin(self) -> None:
        self._has_begun = True
        self._errors = logs.Logger.errors
        self._start_time = linux.process_start_time(os.getpid()) or 0
        loop = asyncio.get_running_loop()
        for signum in _FINAL_SIGNALS:
            loop.add_signal_handler(signum, self._signalled, signum)

    async def _serve(self, listener: Listener | None = None) -> None:
        path = self._members.first.config.socket
        if self._server.listener < 0:
            await self._server.start(path, listener)
        else:
            self._server.open(path)

    async def _settle_in(self, first: Member) -> None:
        """Do what no container waits for while the runtime makes it, or soon, if nothing is asked.

        containerd, which made the bundle, knows this process from its answer. One that was killed
        meanwhile finds it at the socket that the bundle names; if both were, the bundle names no
        process, and has a container that nobody was told of: it is taken away, as with a shim that
        dies over ``create``.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(_SETTLE_IN_S):
                await self._reaper.spawned.wait()
        if first not in list(self._members):  # it may have left
            return
        first.keeping.open()
        try:
            first.write_identity(self._identity())
        except OSError as error:
            log.warning("bundle does not say who its shim is", error=error.strerror)
        first.register()

    async def _take_over(self, successor: Successor) -> None:
        """Go on where an earlier image of this process was."""
        self._reexecution.attempt = successor.attempt
        document = successor.document
        self._gate.shut()
        self._members.unpack(document, ShimConfig.from_request)
        self._tasks.unpack(document["tasks"])
        self._reaper.zombies_reaped = document["zombies_reaped"]
        self._metrics.generation.set(successor.attempt.generation)
        listener = successor.listener()
        await self._serve(Listener(listener) if listener is not None else None)
        self._save()
        successor.commit()
        self._go_on()
        self._reexecution.attempt = successor.attempt
        log.info(
            "shim took over",
            generation=successor.attempt.generation,
            downtime_us=successor.attempt.downtime_us,
            version_before=document["version"],
            failure=successor.attempt.failure,
        )

    async def _adopt(self) -> None:
        """Take over the containers of a shim that died."""
        self._gate.shut()
        self._tasks.unpack(await self._members.first.read_legacy())
        await self._serve()
        self._save()
        self._go_on()
        log.warning("containers of a dead shim adopted", containers=len(self._tasks))

    def _go_on(self) -> None:
        for member in self._members:
            member.keeping.open()
        self._sandboxes.resume()
        self._reaper.start()
        self._tasks.go_on()
        self._gate.open()

    def _pack(self, out: Outgoing) -> dict[str, Any]:
        return {
            **self._members.pack(),
            "listener": out.fd(self._server.listener),
            "tasks": self._tasks.pack(out),
            "zombies_reaped": self._reaper.zombies_reaped,
        }

    def _build_server(self) -> ShimServer:
        task = TaskService(self._tasks)
        control = ControlService(
            self._members, self._tasks, self._hosting, self._page, self._reexecution
        )
        return ShimServer(
            metrics=self._metrics.server,
            interceptors=[self._gate],
            services=[
                Service(shim_pb2_grpc.add_TaskServicer_to_server, task, _TASK),
                Service(
                    shim_v2_pb2_grpc.add_TaskServicer_to_server,
                    task,
                    shim_v2_pb2.DESCRIPTOR.services_by_name["Task"],
                ),
                Service(
                    sandbox_pb2_grpc.add_SandboxServicer_to_server,
                    SandboxService(self._sandboxes),
                    sandbox_pb2.DESCRIPTOR.services_by_name["Sandbox"],
                ),
                Service(
                    streams_pb2_grpc.add_StreamsServicer_to_server,
                    StreamsService(self._tasks, self._gate),
                    streams_pb2.DESCRIPTOR.services_by_name["Streams"],
                ),
                Service(
                    control_pb2_grpc.add_ControlServicer_to_server,
                    control,
                    control_pb2.DESCRIPTOR.services_by_name["Control"],
                ),
            ],
        )

    async def _end(self, linger_s: float) -> None:
        """Wait for the first reason to end."""
        reasons = [
            asyncio.create_task(self._tasks.shutdown_now.wait()),
            asyncio.create_task(self._shutdown_and_delivered()),
            asyncio.create_task(self._empty_for_long(linger_s)),
            asyncio.create_task(self._hosting.deserted.wait()),
        ]
        await asyncio.wait(reasons, return_when=asyncio.FIRST_COMPLETED)
        self._was_dismissed = reasons[1].done() and not self._tasks.shutdown_now.is_set()
        for reason in reasons:
            reason.cancel()
        await asyncio.wait(reasons)

    async def _shutdown_and_delivered(self) -> None:
        await self._tasks.shutdown.wait()
        await self._members.delivered()

    async def _empty_for_long(self, linger_s: float) -> None:
        while True:
            await self._tasks.emptied.wait()
            self._tasks.emptied.clear()
            await self._members.delivered()
            await asyncio.sleep(linger_s)
            wanted = any(
                len(member.spool) or member.fresh or self._sandboxes.keeps(member)
                for member in self._members
            )
            if not len(self._tasks) and not wanted:
                return

    def _signalled(self, signum: int) -> None:
        if not len(self._members):
            self._unwanted()
            return
        if len(self._tasks):
            log.warning("signal ignored, there are containers", signal=signum)
            return
        log.info("ending on a signal", signal=signum)
        self._tasks.request_shutdown(now=True)

    def _make_member(self, config: ShimConfig) -> Member:
        return Member(
            config,
            metrics=self._metrics,
            reaper=self._reaper,
            background=self._background,
            hello=self._hello,
            epoch_seen=lambda member: self._tasks.save(member.home),
        )

    def _save(self) -> None:
        for member in self._members:
            self._tasks.save(member.home)

    def _page(self) -> bytes:
        members = list(self._members)
        metrics = self._metrics
        metrics.zombies_reaped.set(self._reaper.zombies_reaped)
        metrics.spool_length.set(sum(len(member.spool) for member in members))
        metrics.registered.set(all(member.registry.registered for member in members))
        metrics.containers.set(len(self._tasks))
        return metrics.page()

    def _identity(self) -> dict[str, object]:
        return {**self.identity, "address": f"unix://{self._members.first.config.socket}"}

    def _defaults(self) -> Defaults:
        config = self._members.first.config
        return Defaults(
            namespace=config.namespace,
            runtime=config.default_runtime,
            runtime_state=config.registry.parent / "runtime",
            runtime_timeout_s=config.runtime_timeout_s,
        )

    def _hello(self, member: Member) -> registry_pb2.Hello:
        config = member.config
        return registry_pb2.Hello(
            namespace=config.namespace,
            id=config.id,
            instance_id=config.instance_id,
            pid=os.getpid(),
            pid_start_time=self._start_time,
            boot_id=self._boot_id,
            address=f"unix://{config.socket}",
            version=VERSION,
            protocol_min=PROTOCOL,
            protocol_max=PROTOCOL,
            processes=[
                _process_state(process, container.status(process))
                for container in self._tasks.at(member.home)
                for process in container.processes
            ],
            first_seq=member.spool.first_seq,
            last_seq=member.spool.last_seq,
            bundle=str(config.bundle),
        )


def _nothing() -> None:
    return


def _process_state(process: Process, status: Status) -> registry_pb2.ProcessState:
    record, stdio = process.exit, process.stdio
    return registry_pb2.ProcessState(
        container_id=process.container_id,
        exec_id=process.exec_id,
        pid=process.pid,
        status=str(status),
        exit_status=record.status if record else 0,
        exited_at=timestamp(record.exited_at_ns) if record else None,
        exit_status_lost=bool(record and record.lost),
        streams=registry_pb2.ProcessState.Streams(
            stdin=stdio.stdin, stdout=stdio.stdout, stderr=stdio.stderr, terminal=stdio.terminal
        ),
    )
