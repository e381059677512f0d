"""Builds containerd: every object, and who gets which. Start reading here.

Order of a start: the lock on the root, the database, a quick check if the run before it did not end
by itself, what a crash left in the content store, the shims of the state directory, then the
socket. From then on the API answers; what else has to be put right (snapshots' directories,
garbage, shims that have not registered yet) happens behind it, and the factory of new shims comes
up once those that run are back. What few calls need is made for the first of them (:mod:`.late`). A
stop is the reverse: readers of events and shims are told to come back, calls under way get their
time, the database is closed, the lock goes.
"""

from __future__ import annotations

import asyncio
import uuid
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Self

import structlog

from services.common.background import Background
from services.common.database import Database
from services.common.disk import DiskFloor, DiskReserve
from services.common.draining import Draining
from services.common.errors import TheseusError
from services.common.metrics import Registry, ServerMetrics
from services.common.metrics_endpoint import MetricsEndpoint
from services.common.root_lock import RootLock
from services.common.server import RpcServer
from services.containerd.check.unclean import run_noted
from services.containerd.clients.foreign_shim import connect_shim
from services.containerd.clients.shim import dial_shim
from services.containerd.clients.shim_events import ShimEventCodec
from services.containerd.clients.shim_program import ShimPrograms
from services.containerd.containers.local import LocalContainerStore
from services.containerd.content.local import LocalContentStore
from services.containerd.events.exchange import Exchange
from services.containerd.events.journal import Journal
from services.containerd.gc.collector import Collector
from services.containerd.gc.lock import GcLock
from services.containerd.gc.scheduler import GcSchedule
from services.containerd.images.local import LocalImageStore
from services.containerd.images.platform import host_platform
from services.containerd.late.foundations import Foundations
from services.containerd.leases.manager import LeaseManager
from services.containerd.metadata import meta
from services.containerd.metadata.schema import MIGRATIONS
from services.containerd.metrics import ContainerdMetrics, join_pages
from services.containerd.namespaces.registry import Namespaces
from services.containerd.plugins import Plugged, list_plugins
from services.containerd.rpc.containers import ContainersService
from services.containerd.rpc.content import ContentService
from services.containerd.rpc.encoding import encode_event
from services.containerd.rpc.events import EventsService, event_field
from services.containerd.rpc.images import ImagesService
from services.containerd.rpc.introspection import IntrospectionService
from services.containerd.rpc.journal import JournalService
from services.containerd.rpc.leases import LeasesService, bind_lease
from services.containerd.rpc.namespaces import NamespacesService
from services.containerd.rpc.registry import RegistryService
from services.containerd.rpc.runs import RunsService
from services.containerd.rpc.served import late_services, services
from services.containerd.rpc.shim_events import ShimEvents
from services.containerd.rpc.shim_socket import ShimSocket
from services.containerd.rpc.snapshots import SnapshotsService
from services.containerd.rpc.streams import StreamsService
from services.containerd.rpc.tasks import TasksService
from services.containerd.rpc.version import VersionService
from services.containerd.runtimes import OUR_RUNTIMES
from services.containerd.snapshots.native import NativeSnapshotter
from services.containerd.snapshots.overlay import OverlaySnapshotter
from services.containerd.snapshots.recorded import SnapshotIds
from services.containerd.snapshots.snapshotter import find_configured
from services.containerd.tasks.bundle import Bundles
from services.containerd.tasks.cgroup_moves import CgroupMoves
from services.containerd.tasks.checkpoints import Checkpoints
from services.containerd.tasks.factory import FactoryClient
from services.containerd.tasks.fd_keeper import DescriptorKeeper
from services.containerd.tasks.foreign import ForeignRuntimes
from services.containerd.tasks.journal import TaskJournal
from services.containerd.tasks.manager import TaskManager
from services.containerd.tasks.merging import MemoryMerger
from services.containerd.tasks.metrics import TaskMetrics
from services.containerd.tasks.shims import Identity, ShimManager
from services.containerd.tasks.undertaker import Undertaker

if TYPE_CHECKING:
    from types import TracebackType

    from services.containerd.clients.snapshots import SnapshotsClient
    from services.containerd.config import Config
    from services.containerd.snapshots.recorded import RecordedSnapshotter

log = structlog.get_logger(__name__)

_RETURN_S = 2.0
_LOCAL_SNAPSHOTTERS = (OverlaySnapshotter, NativeSnapshotter)


class App:
    """A whole containerd. ``async with`` starts it and stops it.

    Raises:
        FailedPrecondition: another process owns the root, or the database is too new.
        InvalidArgument: a path or an address makes no sense.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._scratch = config.state / "scratch"
        self._stack = AsyncExitStack()
        self._draining = Draining("containerd")
        self._registry = Registry()
        self._metrics = ContainerdMetrics(self._registry)
        self._moves = CgroupMoves()
        self._build_storage()

    def _build_storage(self) -> None:
        config = self._config
        self._reserve = DiskReserve(config.root / "reserve", config.disk_reserve_bytes)
        self._floor = DiskFloor(config.root, config.disk_floor_bytes)
        self._db = Database(config.root / "meta.db", reserve=self._reserve)
        self._journal = Journal(
            self._db,
            encode_event,
            keep_events=config.journal_events,
            keep_s=config.journal_s,
            keep_bytes=config.journal_bytes,
        )
        self._exchange = Exchange(self._db, self._journal, event_field)
        gc_lock = GcLock()
        self._gc = GcSchedule(config.gc, observe=self._metrics.observe_collection)
        self._leases = LeaseManager(self._db, mutations=self._gc)
        self._content = LocalContentStore(
            config.root,
            self._db,
            events=self._journal,
            gc_lock=gc_lock,
            mutations=self._gc,
            floor=self._floor,
        )
        self._build_snapshotters()
        self._collector = Collector(
            self._db,
            self._journal,
            gc_lock,
            content=self._content,
            snapshotters=self._snapshotters,
        )
        self._namespaces = Namespaces(self._db, self._journal)
        self._containers = LocalContainerStore(self._db, self._journal, mutations=self._gc)
        self._images = LocalImageStore(
            self._db, self._journal, mutations=self._gc, collect=self._gc.collect
        )

    def _build_snapshotters(self) -> None:
        config = self._config
        ids = SnapshotIds()
        self._snapshotters: dict[str, RecordedSnapshotter] = {}
        self._plugged: dict[str, Plugged] = {}
        self._backends: list[SnapshotsClient] = []
        for kind in _LOCAL_SNAPSHOTTERS:
            local = kind(
                config.root,
                self._db,
                events=self._journal,
                leases=self._leases,
                ids=ids,
                mutations=self._gc,
            )
            self._snapshotters[local.name] = local
            self._plugged[local.name] = Plugged({"root": str(local.root)}, local.capabilities)
        self._plug_in(ids)
        find_configured(self._snapshotters, config.snapshotter)

    def _plug_in(self, ids: SnapshotIds) -> None:
        """Add the snapshotters that others serve."""
        proxies = self._config.proxy_snapshotters
        if not proxies:
            return
        # Imported late: most nodes have none.
        from services.containerd.clients.snapshots import SnapshotsClient
        from services.containerd.snapshots.remote import RemoteSnapshotter

        for proxy in proxies:
            backend = SnapshotsClient(proxy.name, proxy.address)
            self._backends.append(backend)
            self._snapshotters[proxy.name] = RemoteSnapshotter(
                backend,
                self._db,
                events=self._journal,
                leases=self._leases,
                capabilities=proxy.capabilities,
                ids=ids,
                mutations=self._gc,
            )
            self._plugged[proxy.name] = Plugged({"address": proxy.address}, proxy.capabilities)

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
        for directory in (config.state, self._scratch):
            await asyncio.to_thread(directory.mkdir, parents=True, exist_ok=True, mode=0o711)
        await asyncio.to_thread(self._reserve.settle)
        await asyncio.to_thread(self._db.open, MIGRATIONS)
        stack.push_async_callback(asyncio.to_thread, self._db.close)
        self._journal.attach()
        epoch = await self._db.write(meta.next_epoch)
        self._metrics.epoch.set(epoch)
        await self._leases.begin(epoch)
        names = tuple(local.name for local in _LOCAL_SNAPSHOTTERS)
        found = await stack.enter_async_context(run_noted(self._db, config.root, names))
        self._metrics.start_damage.set(sum(finding.remains for finding in found))
        await self._content.reconcile()
        for backend in self._backends:
            stack.push_async_callback(backend.close)
        for snapshotter in self._snapshotters.values():
            await snapshotter.open()
            stack.push_async_callback(snapshotter.close)
        shims, tasks, factory = await self._start_tasks(stack, epoch)
        calls = ServerMetrics()
        self._registry.add(calls.lines)
        events = ShimEvents(shims, self._exchange)
        await stack.enter_async_context(
            ShimSocket(config.address, shims=shims, events=events, metrics=calls)
        )
        background = await stack.enter_async_context(Background())
        await self._serve(stack, shims, tasks, events, calls)
        background.start(_begin_later(factory, shims), name="start of the shim factory")
        background.start(self._gc.run(self._collector), name="garbage collection")
        background.start(self._clean_snapshots(), name="cleanup of snapshots")
        background.start(self._reserve.keep(), name="reserve on the disk")
        background.start(self._journal.keep_bounded(), name="truncation of the journal")
        log.info("serving", address=str(config.address), root=str(config.root), epoch=epoch)

    async def _start_tasks(
        self, stack: AsyncExitStack, epoch: int
    ) -> tuple[ShimManager, TaskManager, FactoryClient]:
        config = self._config
        metrics = TaskMetrics(self._registry)
        journal = TaskJournal(self._db, self._journal, ShimEventCodec())
        bundles = Bundles(config.state)
        keeper = await stack.enter_async_context(
            DescriptorKeeper(config.shim, config.state / "keeper.sock")
        )
        factory = await stack.enter_async_context(
            FactoryClient(
                config.shim,
                socket=config.state / "factory.sock",
                registry=config.address,
                default_runtime=config.default_runtime,
                log_level=config.log_level,
                keeper=keeper.path,
                places=config.state / "w",
                waiting=config.waiting_shims,
                dial=dial_shim,
                at_once=False,
            )
        )
        await stack.enter_async_context(self._moves)
        merger = await stack.enter_async_context(
            MemoryMerger(config.state / "ksm.json", allowed=config.merge_memory)
        )
        programs = ShimPrograms(
            address=config.address, publisher=config.publisher, log_level=config.log_level
        )
        shims = await stack.enter_async_context(
            ShimManager(
                bundles=bundles,
                journal=journal,
                undertaker=Undertaker(journal, keeper, programs),
                connect=connect_shim,
                metrics=metrics,
                identity=Identity(uuid.uuid4().hex, epoch),
                grace_s=config.shim_grace_s,
                launcher=factory,
                containers_per_shim=config.containers_per_shim,
                met=merger.request,
            )
        )
        tasks = TaskManager(
            containers=self._containers,
            shims=shims,
            launchers=dict.fromkeys(OUR_RUNTIMES, factory),
            journal=journal,
            metrics=metrics,
            foreign=ForeignRuntimes(programs, connect_shim, config.runtimes),
            moving=self._moves.expect,
        )
        return shims, tasks, factory

    async def _serve(
        self,
        stack: AsyncExitStack,
        shims: ShimManager,
        tasks: TaskManager,
        events: ShimEvents,
        calls: ServerMetrics,
    ) -> None:
        config = self._config
        identity = await self._db.write(lambda tx: meta.setdefault(tx, "uuid", str(uuid.uuid4())))
        server = RpcServer(
            tier="containerd",
            socket=config.address,
            services=services(self._servicers(shims, tasks, events, identity).items()),
            late=late_services(await self._foundations(stack, shims, tasks)),
            metrics=calls,
            bind=bind_lease,
        )
        await server.start()
        stack.push_async_callback(server.stop, config.drain_s)
        stack.callback(shims.drain)
        stack.callback(self._draining.drain)
        stack.callback(self._journal.stop)
        if config.metrics_address:

            async def render() -> bytes:
                await self._metrics.refresh(self._db)
                page = await asyncio.to_thread(self._registry.page)
                return join_pages(page, await shims.scrape())

            endpoint = MetricsEndpoint(config.metrics_address, render)
            await endpoint.start()
            stack.push_async_callback(endpoint.stop)

    async def _foundations(
        self, stack: AsyncExitStack, shims: ShimManager, tasks: TaskManager
    ) -> Foundations:
        return Foundations(
            config=self._config,
            scratch=self._scratch,
            db=self._db,
            floor=self._floor,
            journal=self._journal,
            content=self._content,
            images=self._images,
            leases=self._leases,
            snapshotters=self._snapshotters,
            metrics=self._metrics,
            shims=shims,
            tasks=tasks,
            draining=self._draining,
            stack=await stack.enter_async_context(AsyncExitStack()),
        )

    def _servicers(
        self, shims: ShimManager, tasks: TaskManager, events: ShimEvents, identity: str
    ) -> dict[str, object]:
        plugins = list_plugins(
            platform=host_platform(),
            content_root=str(self._config.root / "content"),
            snapshotters=self._plugged,
            gc=self._config.gc,
        )
        return {
            "containers": ContainersService(self._containers, self._moves.expect),
            "content": ContentService(self._content),
            "events": EventsService(self._exchange, events),
            "images": ImagesService(self._images),
            "introspection": IntrospectionService(plugins, uuid=identity, runtimes=OUR_RUNTIMES),
            "journal": JournalService(self._journal),
            "leases": LeasesService(self._leases, collect=self._gc.collect),
            "namespaces": NamespacesService(self._namespaces),
            "registry": RegistryService(shims),
            "runs": RunsService(self._containers, tasks, self._moves.expect),
            "snapshots": SnapshotsService(self._snapshotters),
            "streams": StreamsService(tasks, self._draining),
            "tasks": TasksService(
                tasks,
                self._containers,
                Checkpoints(self._content, self._scratch),
                self._draining,
            ),
            "version": VersionService(),
        }

    async def _clean_snapshots(self) -> None:
        for snapshotter in self._snapshotters.values():
            try:
                await snapshotter.cleanup()
            except TheseusError as error:  # a service that is not there: the collector tries again
                log.warning("not cleaned up", snapshotter=snapshotter.name, reason=error.message)


async def _begin_later(factory: FactoryClient, shims: ShimManager) -> None:
    """Start the factory when the shims are back, which need the processor for that."""
    await shims.returned(_RETURN_S)
    factory.begin()
