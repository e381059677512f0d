"""Builds containerd: every object, and who gets which. Start reading here.

Order of a start: the lock on the root, the database, what a crash left in the content store, the
shims of the state directory, then the socket. From then on the API answers; what else has to be put
right (snapshots' directories, garbage, shims that have not registered yet) happens behind it.
A stop is the reverse: readers of events are told to come back, calls under way get their time, the
database is closed, the lock goes.
"""

from __future__ import annotations

import asyncio
import uuid
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Self

import structlog
from prometheus_client import CollectorRegistry

from protos.containerd.services.containers.v1 import containers_pb2, containers_pb2_grpc
from protos.containerd.services.events.v1 import events_pb2, events_pb2_grpc
from protos.containerd.services.images.v1 import images_pb2, images_pb2_grpc
from protos.containerd.services.introspection.v1 import introspection_pb2, introspection_pb2_grpc
from protos.containerd.services.leases.v1 import leases_pb2, leases_pb2_grpc
from protos.containerd.services.namespaces.v1 import namespace_pb2, namespace_pb2_grpc
from protos.containerd.services.version.v1 import version_pb2, version_pb2_grpc
from protos.theseus.journal.v1 import journal_pb2, journal_pb2_grpc
from services.common.background import Background
from services.common.database import Database
from services.common.metrics import MetricsEndpoint, ServerMetrics, render_registry
from services.common.root_lock import RootLock
from services.common.server import RpcServer, Service
from services.containerd.containers.local import LocalContainerStore
from services.containerd.content.local import LocalContentStore
from services.containerd.events.exchange import Exchange
from services.containerd.events.journal import Journal
from services.containerd.gc.collector import Collector
from services.containerd.gc.lock import GcLock
from services.containerd.gc.scheduler import GcSchedule
from services.containerd.images.local import LocalImageStore
from services.containerd.images.platform import host_platform
from services.containerd.leases.manager import LeaseManager
from services.containerd.metadata import meta
from services.containerd.metadata.schema import MIGRATIONS
from services.containerd.metrics import ContainerdMetrics
from services.containerd.namespaces.registry import Namespaces
from services.containerd.plugins import list_plugins
from services.containerd.rpc.containers import ContainersService
from services.containerd.rpc.encoding import encode_event
from services.containerd.rpc.events import EventsService, event_field
from services.containerd.rpc.images import ImagesService
from services.containerd.rpc.introspection import IntrospectionService
from services.containerd.rpc.journal import JournalService
from services.containerd.rpc.leases import LeaseInterceptor, LeasesService
from services.containerd.rpc.namespaces import NamespacesService
from services.containerd.rpc.version import VersionService
from services.containerd.snapshots.overlay import OverlaySnapshotter

if TYPE_CHECKING:
    from types import TracebackType

    from services.containerd.config import Config

log = structlog.get_logger(__name__)

RUNTIMES = ("io.containerd.runc.v2", "io.containerd.runtime.v1.linux")
"""Names of runtimes that mean our shim."""

_JOURNAL_TRUNCATION_S = 600.0


class App:
    """A whole containerd. ``async with`` starts it and stops it.

    Raises:
        FailedPrecondition: another process owns the root, or the database is too new.
        InvalidArgument: a path or an address makes no sense.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._stack = AsyncExitStack()
        self._registry = CollectorRegistry()
        self._metrics = ContainerdMetrics(self._registry)
        self._db = Database(config.root / "meta.db")
        self._journal = Journal(
            self._db, encode_event, keep_events=config.journal_events, keep_s=config.journal_s
        )
        self._exchange = Exchange(self._db, self._journal, event_field)
        gc_lock = GcLock()
        self._leases = LeaseManager(self._db, on_garbage=self._on_garbage)
        self._content = LocalContentStore(
            config.root, self._db, events=self._journal, gc_lock=gc_lock
        )
        overlay = OverlaySnapshotter(
            config.root, self._db, events=self._journal, leases=self._leases
        )
        self._snapshotters = {overlay.name: overlay}
        collector = Collector(
            self._db,
            self._journal,
            gc_lock,
            content=self._content,
            snapshotters=self._snapshotters,
        )
        self._gc = GcSchedule(
            collector,
            delay_s=config.gc_delay_s,
            interval_s=config.gc_interval_s,
            observe=self._metrics.observe_collection,
        )
        self._namespaces = Namespaces(self._db, self._journal)
        self._containers = LocalContainerStore(self._db, self._journal, on_garbage=self._on_garbage)
        self._images = LocalImageStore(
            self._db, self._journal, on_garbage=self._on_garbage, collect=self._gc.collect
        )
        self._identity = ""

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
        await asyncio.to_thread(self._db.open, MIGRATIONS)
        stack.push_async_callback(asyncio.to_thread, self._db.close)
        self._journal.attach()
        epoch = await self._db.write(meta.next_epoch)
        self._metrics.epoch.set(epoch)
        self._identity = await self._db.write(
            lambda tx: meta.setdefault(tx, "uuid", str(uuid.uuid4()))
        )
        await self._content.reconcile()
        for snapshotter in self._snapshotters.values():
            await snapshotter.open()
        background = await stack.enter_async_context(Background())
        server = RpcServer(
            tier="containerd",
            socket=config.address,
            services=self._services(),
            metrics=ServerMetrics(self._registry),
            interceptors=[LeaseInterceptor()],
        )
        await server.start()
        stack.push_async_callback(server.stop, config.drain_s)
        stack.callback(self._journal.stop)
        if config.metrics_address:
            endpoint = MetricsEndpoint(config.metrics_address, self._render_metrics)
            await endpoint.start()
            stack.push_async_callback(endpoint.stop)
        background.start(self._gc.run(), name="garbage collection")
        background.start(self._clean_snapshots(), name="cleanup of snapshots")
        background.start(self._truncate_journal(), name="truncation of the journal")
        self._gc.request()
        log.info("serving", address=str(config.address), root=str(config.root), epoch=epoch)

    def _services(self) -> list[Service]:
        plugins = list_plugins(
            platform=host_platform(),
            content_root=str(self._config.root / "content"),
            snapshotters={name: str(s.root) for name, s in self._snapshotters.items()},
        )
        return [
            Service(
                containers_pb2_grpc.add_ContainersServicer_to_server,
                ContainersService(self._containers),
                containers_pb2.DESCRIPTOR.services_by_name["Containers"],
            ),
            Service(
                images_pb2_grpc.add_ImagesServicer_to_server,
                ImagesService(self._images),
                images_pb2.DESCRIPTOR.services_by_name["Images"],
            ),
            Service(
                namespace_pb2_grpc.add_NamespacesServicer_to_server,
                NamespacesService(self._namespaces),
                namespace_pb2.DESCRIPTOR.services_by_name["Namespaces"],
            ),
            Service(
                leases_pb2_grpc.add_LeasesServicer_to_server,
                LeasesService(self._leases, collect=self._gc.collect),
                leases_pb2.DESCRIPTOR.services_by_name["Leases"],
            ),
            Service(
                events_pb2_grpc.add_EventsServicer_to_server,
                EventsService(self._exchange),
                events_pb2.DESCRIPTOR.services_by_name["Events"],
            ),
            Service(
                journal_pb2_grpc.add_JournalServicer_to_server,
                JournalService(self._journal),
                journal_pb2.DESCRIPTOR.services_by_name["Journal"],
            ),
            Service(
                introspection_pb2_grpc.add_IntrospectionServicer_to_server,
                IntrospectionService(plugins, uuid=self._identity, runtimes=RUNTIMES),
                introspection_pb2.DESCRIPTOR.services_by_name["Introspection"],
            ),
            Service(
                version_pb2_grpc.add_VersionServicer_to_server,
                VersionService(),
                version_pb2.DESCRIPTOR.services_by_name["Version"],
            ),
        ]

    def _on_garbage(self) -> None:
        self._gc.request()

    async def _render_metrics(self) -> bytes:
        await self._metrics.refresh(self._db)
        return await asyncio.to_thread(render_registry, self._registry)

    async def _clean_snapshots(self) -> None:
        for snapshotter in self._snapshotters.values():
            await snapshotter.cleanup()

    async def _truncate_journal(self) -> None:
        while True:
            await self._journal.truncate()
            await asyncio.sleep(_JOURNAL_TRUNCATION_S)
