"""Builds a shim out of its parts and runs it from its birth to its end.

The only file that knows all classes. A shim ends when Shutdown was asked for, or a while after its
last container was deleted, and in both cases only once containerd has acknowledged every event. If
containerd never comes back it stays.
"""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
import structlog

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
from services.common.background import Background
from services.common.client import connect
from services.common.server import RpcServer, Service
from services.shim.bundle import Bundle
from services.shim.clients.events import timestamp
from services.shim.clients.registry import PROTOCOL, RegistryClient
from services.shim.container import Surroundings
from services.shim.keeping import Keeping
from services.shim.legacy import read_legacy
from services.shim.reaper import Reaper
from services.shim.reexec import Attempt, Reexecution, find_listener
from services.shim.rpc.control import ControlService
from services.shim.rpc.gate import Gate
from services.shim.rpc.streams import StreamsService
from services.shim.rpc.task import TaskService
from services.shim.spool import Spool
from services.shim.tasks import Tasks

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from services.shim.config import ShimConfig
    from services.shim.handover import Outgoing
    from services.shim.metrics import ShimMetrics
    from services.shim.process import Process, Status
    from services.shim.reexec import Successor

log = structlog.get_logger(__name__)

_STOP_GRACE_S = 2.0
_FINAL_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass(frozen=True, slots=True)
class Transport:
    """What a shim's calls travel by."""

    make_server: Callable[..., Any]
    make_channel: Callable[[Path], Any]


GRPC = Transport(grpc.aio.server, connect)


class Shim:
    """One shim. Make it inside the event loop, then ``run`` it."""

    def __init__(
        self,
        config: ShimConfig,
        metrics: ShimMetrics,
        successor: Successor | None = None,
        *,
        transport: Transport = GRPC,
    ) -> None:
        self._successor = successor
        self._transport = transport
        self._config = config
        self._metrics = metrics
        self._bundle = Bundle(config.bundle)
        self._reaper = Reaper()
        self._background = Background()
        self._keeping = Keeping(config.keeper, config.instance_id)
        self._spool = Spool(self._bundle.spool, write_failed=metrics.spool_failures.inc)
        self._tasks = Tasks(
            Surroundings(
                namespace=config.namespace,
                reaper=self._reaper,
                events=self._spool,
                metrics=metrics,
                background=self._background,
                keeping=self._keeping,
            ),
            home=self._bundle,
            default_runtime=config.default_runtime,
            runtime_state=config.registry.parent / "runtime",
            runtime_timeout_s=config.runtime_timeout_s,
        )
        self._tasks.epoch = int(self._bundle.read("state.json").get("epoch", 0))
        self._registry = RegistryClient(
            config.registry,
            hello=self._hello,
            spool=self._spool,
            metrics=metrics,
            epoch=self._tasks.epoch,
            epoch_seen=self._keep_epoch,
            make_channel=transport.make_channel,
        )
        self._gate = Gate()
        self._reexecution = Reexecution(
            gate=self._gate,
            tasks=self._tasks,
            reaper=self._reaper,
            attempt=successor.attempt if successor is not None else Attempt(),
            pack=self._pack,
        )
        self._server = self._build_server()
        self._boot_id = linux.boot_id()
        self._start_time = linux.process_start_time(os.getpid()) or 0

    async def run(self, serving: Callable[[dict[str, object]], None]) -> None:
        """Serve until the end; ``serving`` gets the answer for whoever started the shim."""
        loop = asyncio.get_running_loop()
        for signum in _FINAL_SIGNALS:
            loop.add_signal_handler(signum, self._signalled, signum)
        async with self._background:
            if self._successor is not None:
                await self._take_over(self._successor)
            elif self._config.adopt:
                await self._adopt()
            else:
                self._reaper.start()
                self._keeping.open()
                await self._server.start()
            self._write_identity()
            serving(self._identity())
            log.info("shim serves", socket=str(self._config.socket), version=VERSION)
            self._background.start(self._registry.run(), name="registry")
            await self._end()
            await self._tasks.finish()
            await self._server.stop(_STOP_GRACE_S)
        self._reaper.stop()
        self._keeping.forget_all()
        self._keeping.close()
        log.info("shim ends")

    async def _take_over(self, successor: Successor) -> None:
        """Go on where an earlier image of this process was."""
        document = successor.document
        self._gate.shut()
        self._spool.unpack(document["spool"])
        self._keeping.unpack(document["keeping"])
        self._tasks.unpack(document["tasks"])
        self._reaper.zombies_reaped = document["zombies_reaped"]
        self._metrics.generation.set(successor.attempt.generation)
        await self._server.start()
        self._tasks.save()
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
        legacy = await read_legacy(self._bundle, self._keeping, self._metrics.dropped)
        self._tasks.unpack(legacy)
        await self._server.start()
        self._tasks.save()
        self._go_on()
        log.warning("containers of a dead shim adopted", containers=len(self._tasks))

    def _go_on(self) -> None:
        self._keeping.open()
        self._reaper.start()
        self._tasks.go_on()
        self._gate.open()

    def _pack(self, out: Outgoing) -> dict[str, Any]:
        return {
            "config": self._config.to_request(),
            "listener": out.fd(find_listener(self._config.socket)),
            "tasks": self._tasks.pack(out),
            "spool": self._spool.pack(),
            "keeping": self._keeping.pack(),
            "zombies_reaped": self._reaper.zombies_reaped,
        }

    def _build_server(self) -> RpcServer:
        task = TaskService(self._tasks)
        control = ControlService(
            self._config, self._tasks, self._registry, self._page, self._reexecution
        )
        return RpcServer(
            tier="shim",
            socket=self._config.socket,
            metrics=self._metrics.server,
            interceptors=[self._gate],
            make_server=self._transport.make_server,
            services=[
                Service(
                    shim_pb2_grpc.add_TaskServicer_to_server,
                    task,
                    shim_pb2.DESCRIPTOR.services_by_name["Task"],
                ),
                Service(
                    shim_v2_pb2_grpc.add_TaskServicer_to_server,
                    task,
                    shim_v2_pb2.DESCRIPTOR.services_by_name["Task"],
                ),
                Service(
                    streams_pb2_grpc.add_StreamsServicer_to_server,
                    StreamsService(self._tasks),
                    streams_pb2.DESCRIPTOR.services_by_name["Streams"],
                ),
                Service(
                    control_pb2_grpc.add_ControlServicer_to_server,
                    control,
                    control_pb2.DESCRIPTOR.services_by_name["Control"],
                ),
            ],
        )

    async def _end(self) -> None:
        """Wait for the first reason to end."""
        reasons = [
            asyncio.create_task(self._tasks.shutdown_now.wait()),
            asyncio.create_task(self._shutdown_and_delivered()),
            asyncio.create_task(self._empty_for_long()),
        ]
        await asyncio.wait(reasons, return_when=asyncio.FIRST_COMPLETED)
        for reason in reasons:
            reason.cancel()

    async def _shutdown_and_delivered(self) -> None:
        await self._tasks.shutdown.wait()
        await self._spool.emptied()

    async def _empty_for_long(self) -> None:
        while True:
            await self._tasks.emptied.wait()
            self._tasks.emptied.clear()
            await self._spool.emptied()
            await asyncio.sleep(self._config.linger_s)
            if not len(self._tasks) and not len(self._spool):
                return

    def _signalled(self, signum: int) -> None:
        if len(self._tasks):
            log.warning("signal ignored, there are containers", signal=signum)
            return
        log.info("ending on a signal", signal=signum)
        self._tasks.request_shutdown(now=True)

    def _keep_epoch(self, epoch: int) -> None:
        self._tasks.epoch = epoch
        self._tasks.save()

    def _page(self) -> bytes:
        self._metrics.zombies_reaped.set(self._reaper.zombies_reaped)
        self._metrics.spool_length.set(len(self._spool))
        return self._metrics.page()

    def _identity(self) -> dict[str, object]:
        return {
            "pid": os.getpid(),
            "start_time": self._start_time,
            "address": f"unix://{self._config.socket}",
            "version": VERSION,
        }

    def _write_identity(self) -> None:
        config = self._config
        known = self._bundle.read("shim.json")
        self._bundle.write(
            "shim.json",
            {
                **known,
                "instance_id": config.instance_id,
                "namespace": config.namespace,
                "id": config.id,
                "socket": str(config.socket),
                "boot_id": self._boot_id,
                **self._identity(),
            },
        )

    def _hello(self) -> registry_pb2.Hello:
        config = self._config
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
                for container in self._tasks.all()
                for process in (container.init, *container.execs.values())
            ],
            first_seq=self._spool.first_seq,
            last_seq=self._spool.last_seq,
            bundle=str(config.bundle),
        )


def _process_state(process: Process, status: Status) -> registry_pb2.ProcessState:
    record = process.exit
    return registry_pb2.ProcessState(
        container_id=process.container_id,
        exec_id=process.exec_id,
        pid=process.pid,
        status=str(status),
        exit_status=record.status if record else 0,
        exited_at=timestamp(record.exited_at_ns) if record else None,
        exit_status_lost=bool(record and record.lost),
    )
