"""Builds the daemon: every object, and who gets which. Start reading here.

Order of a start: the lock on the root, the database, the records, volumes and networks as the
records have them, then the socket. containerd need not be there: its journal is followed as soon as
it is, and until then whatever needs it is answered UNAVAILABLE. When it is there, the socket waits
for a moment until the records agree with it.

A stop is the reverse: calls that may take for ever are told to come back, others get their time,
the database is closed, the lock goes.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack, suppress
from ipaddress import IPv4Interface
from typing import TYPE_CHECKING, Self

import structlog

from protos.theseus.engine.v1 import (
    containers_pb2,
    containers_pb2_grpc,
    images_pb2,
    images_pb2_grpc,
    system_pb2,
    system_pb2_grpc,
)
from services.common.background import Background
from services.common.database import Database
from services.common.disk import DiskReserve
from services.common.draining import Draining
from services.common.errors import TheseusError
from services.common.metrics import Registry, ServerMetrics
from services.common.metrics_endpoint import MetricsEndpoint
from services.common.root_lock import RootLock
from services.common.server import RpcServer, Service
from services.daemon.clients.connection import Connection
from services.daemon.clients.containers import ContainerdContainers
from services.daemon.clients.images import ContainerdContent, ContainerdImages
from services.daemon.clients.journal import ContainerdJournal
from services.daemon.clients.snapshots import ContainerdSnapshots
from services.daemon.clients.streams import ContainerdStreams
from services.daemon.clients.tasks import ContainerdTasks
from services.daemon.clients.transfer import ContainerdTransfer
from services.daemon.clients.upgrades import ContainerdUpgrades
from services.daemon.containers import rootfs
from services.daemon.containers.attach import Attacher
from services.daemon.containers.below import Below, no_trace
from services.daemon.containers.caretaker import Caretaker
from services.daemon.containers.cleanup import Cleaner
from services.daemon.containers.create import Creator
from services.daemon.containers.directory_watch import DirectoryWatch
from services.daemon.containers.exec import Execs
from services.daemon.containers.exec_run import ExecRuns
from services.daemon.containers.exec_store import ExecStore
from services.daemon.containers.files import ContainerFiles
from services.daemon.containers.follower import Follower
from services.daemon.containers.init_processes import InitProcesses
from services.daemon.containers.locks import OperationLocks
from services.daemon.containers.logs import Logs
from services.daemon.containers.manager import ContainerManager
from services.daemon.containers.oci_runtimes import OciRuntimes
from services.daemon.containers.reconcile import Reconciler
from services.daemon.containers.remove import Remover
from services.daemon.containers.sessions import Sessions
from services.daemon.containers.start import Starter
from services.daemon.containers.stop import Stopper
from services.daemon.containers.store import ContainerStore
from services.daemon.containers.wait import Waiter
from services.daemon.images.store import ImageStore
from services.daemon.metadata.containers import volume_users
from services.daemon.metadata.schema import MIGRATIONS
from services.daemon.metrics import DaemonMetrics
from services.daemon.networks.bridge import BridgeNetwork
from services.daemon.networks.network import NetworkConfig
from services.daemon.rpc.containers import ContainersService
from services.daemon.rpc.execs import ExecsService
from services.daemon.rpc.images import ImagesService
from services.daemon.rpc.system import SystemService
from services.daemon.rpc.volumes import VolumesService
from services.daemon.spec.host import HostFacts
from services.daemon.system import SystemReporter
from services.daemon.upgrades import Upgrades
from services.daemon.volumes.store import VolumeStore

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from services.daemon.config import Config
    from services.daemon.containers.record import ExecRecord
    from services.daemon.networks.network import Network

log = structlog.get_logger(__name__)

DRAIN_S = 10.0
_SETTLE_S = 1.0


class App:
    """A whole daemon. ``async with`` starts it and stops it.

    Args:
        config: of it.
        network: in place of the bridge, for tests.
        trace: called with the name of each step that is done, for tests of crashes.

    Raises:
        FailedPrecondition: another process owns the root, or the database is too new.
        InvalidArgument: a path or an address makes no sense.
    """

    def __init__(
        self,
        config: Config,
        *,
        network: Network | None = None,
        trace: Callable[[str], None] = no_trace,
    ) -> None:
        self._config = config
        self._stack = AsyncExitStack()
        self._background = Background()
        self._sessions = Sessions()
        self._draining = Draining("the daemon")
        self._watch = DirectoryWatch()
        self._registry = Registry()
        self._metrics = DaemonMetrics(self._registry)
        self._host = HostFacts.read()
        self._reserve = DiskReserve(config.root / "reserve", config.disk_reserve_bytes)
        self._db = Database(config.root / "daemon.db", reserve=self._reserve)
        self._runtimes = OciRuntimes(config.runtimes, config.default_runtime)
        self._network = network or BridgeNetwork(self._db, _network_config(config))
        self._trace = trace

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            await self._start(stack)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._stack.aclose()

    async def _start(self, stack: AsyncExitStack) -> None:
        config = self._config
        await stack.enter_async_context(RootLock(config.root).held(config.lock_timeout_s))
        await asyncio.to_thread(config.state.mkdir, parents=True, exist_ok=True, mode=0o711)
        await asyncio.to_thread(self._reserve.settle)
        await asyncio.to_thread(self._db.open, MIGRATIONS)
        stack.push_async_callback(asyncio.to_thread, self._db.close)
        # Made here, not before: gRPC belongs to the running event loop.
        self._connection = Connection(config.containerd, config.namespace)
        stack.push_async_callback(self._connection.close)
        self._build()
        stack.callback(self._watch.close)
        await self._restore()
        await self._runtimes.probe()
        stack.push_async_callback(self._below.store.close)
        stack.push_async_callback(self._below.execs.close)
        stack.push_async_callback(self._leave_network)
        await stack.enter_async_context(self._background)
        stack.push_async_callback(self._manager.close, DRAIN_S)
        stack.push_async_callback(self._exec_runs.close, DRAIN_S)
        await self._caretaker.returned()
        self._execs.resume()
        self._background.start(self._follower.run(), name="journal")
        self._background.start(self._reserve.keep(), name="reserve on the disk")
        with suppress(TimeoutError):
            async with asyncio.timeout(_SETTLE_S):
                await self._follower.settled.wait()
        await self._serve(stack)

    def _build(self) -> None:
        config, connection = self._config, self._connection
        containers = ContainerdContainers(connection)
        self._below = below = Below(
            store=ContainerStore(self._db),
            execs=ExecStore(self._db),
            locks=OperationLocks(),
            containers=containers,
            init_processes=InitProcesses(containers),
            snapshots=ContainerdSnapshots(connection, config.snapshotter),
            tasks=ContainerdTasks(connection),
            snapshotter=config.snapshotter,
            network=self._network,
            netns_directory=config.state / "netns",
            volumes=VolumeStore(self._db, config.root / "volumes"),
            files=ContainerFiles(config.root / "containers"),
            scratch=config.state / "mounts",
            observer=self._metrics,
            trace=self._trace,
        )
        self._metrics.watch(below.store)
        self._images = ImageStore(
            names=ContainerdImages(connection),
            content=ContainerdContent(connection),
            transfer=ContainerdTransfer(connection),
            snapshots=below.snapshots,
            snapshotter=config.snapshotter,
            users=below.store.users_of,
        )
        cleaner = Cleaner(below, self._sessions)
        remover = Remover(below, cleaner)
        self._caretaker = Caretaker(
            below, cleaner, remover, self._background, grace_s=config.return_grace_s
        )
        reconciler = Reconciler(
            below, cleaner=cleaner, caretaker=self._caretaker, background=self._background
        )
        self._build_verbs(cleaner, remover, reconciler)
        self._follower = Follower(
            self._db,
            below,
            journal=ContainerdJournal(connection),
            reconciler=reconciler,
            caretaker=self._caretaker,
            exec_ended=self._exec_ended,
        )

    def _build_verbs(self, cleaner: Cleaner, remover: Remover, reconciler: Reconciler) -> None:
        below = self._below
        logs = Logs(below.store, below.files, self._watch)
        streams = ContainerdStreams(self._connection)
        self._execs = Execs(
            below,
            host=self._host,
            streams=streams,
            sessions=self._sessions,
            background=self._background,
            clock_ns=time.time_ns,
        )
        self._attacher = Attacher(
            store=below.store,
            execs=below.execs,
            streams=streams,
            logs=logs,
            sessions=self._sessions,
            observer=self._metrics,
        )
        self._exec_runs = ExecRuns(self._execs, self._attacher, self._background)
        self._manager = ContainerManager(
            below,
            creator=Creator(
                below,
                images=self._images,
                runtimes=self._runtimes,
                host=self._host,
                remover=remover,
                caretaker=self._caretaker,
            ),
            starter=Starter(
                below,
                runtimes=self._runtimes,
                host=self._host,
                cleaner=cleaner,
                reconciler=reconciler,
                caretaker=self._caretaker,
                sessions=self._sessions,
            ),
            stopper=Stopper(below),
            remover=remover,
            caretaker=self._caretaker,
            waiter=Waiter(below.store),
            logs=logs,
        )

    async def _restore(self) -> None:
        """Bring what is on this machine in line with the records."""
        below = self._below
        await below.store.load()
        await below.execs.load()
        await below.volumes.restore()
        records = below.store.list_all()
        await self._network.restore([record.id for record in records if record.live])
        await asyncio.to_thread(rootfs.sweep, below.scratch)
        known = {record.id for record in (*records, *below.store.leaving())}
        strangers = await asyncio.to_thread(below.files.sweep, known)
        if strangers:
            log.info("leftover directories removed", directories=strangers)

    async def _serve(self, stack: AsyncExitStack) -> None:
        config = self._config
        calls = ServerMetrics()
        self._registry.add(calls.lines)
        server = RpcServer(
            tier="daemon",
            socket=config.address,
            services=self._services(),
            metrics=calls,
        )
        await server.start()
        self._caretaker.serving()
        stack.push_async_callback(server.stop, DRAIN_S)
        stack.callback(self._draining.drain)
        if config.metrics_address:
            endpoint = MetricsEndpoint(config.metrics_address, self._metrics.page)
            await endpoint.start()
            stack.push_async_callback(endpoint.stop)
        log.info(
            "serving",
            address=str(config.address),
            root=str(config.root),
            containerd=self._follower.connected,
        )

    def _services(self) -> list[Service]:
        system = SystemReporter(
            self._config,
            containerd=self._connection,
            containers=self._manager,
            images=self._images,
            runtimes=self._runtimes,
            host=self._host,
        )
        containers, images, engine = (
            module.DESCRIPTOR.services_by_name
            for module in (containers_pb2, images_pb2, system_pb2)
        )
        return [
            Service(
                containers_pb2_grpc.add_ContainersServicer_to_server,
                ContainersService(self._manager, self._attacher, self._draining),
                containers["Containers"],
            ),
            Service(
                containers_pb2_grpc.add_ExecsServicer_to_server,
                ExecsService(self._execs, self._exec_runs, self._attacher, self._draining),
                containers["Execs"],
            ),
            Service(
                images_pb2_grpc.add_ImagesServicer_to_server,
                ImagesService(self._images),
                images["Images"],
            ),
            Service(
                system_pb2_grpc.add_SystemServicer_to_server,
                SystemService(
                    system, Upgrades(self._manager, ContainerdUpgrades(self._connection))
                ),
                engine["System"],
            ),
            Service(
                system_pb2_grpc.add_VolumesServicer_to_server,
                VolumesService(self._below.volumes, volume_users),
                engine["Volumes"],
            ),
        ]

    async def _leave_network(self) -> None:
        """Without containers on it the bridge is nobody's: it goes with the daemon."""
        try:
            await self._network.teardown_if_unused()
        except TheseusError as error:
            log.warning("network not torn down", error=error.message)

    def _exec_ended(self, record: ExecRecord) -> None:
        self._execs.ended(record)


def _network_config(config: Config) -> NetworkConfig:
    return NetworkConfig(
        netns_directory=config.state / "netns",
        bridge=config.bridge_name,
        table=config.bridge_name,
        gateway=IPv4Interface(config.bridge_subnet),
    )
