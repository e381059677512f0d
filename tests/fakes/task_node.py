"""containerd's tasks over a real socket and database, with fake shims below."""

from __future__ import annotations

import secrets
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

from prometheus_client.parser import text_string_to_metric_families

from protos.containerd.services.tasks.v1 import tasks_pb2, tasks_pb2_grpc
from protos.theseus.shim.v1 import registry_pb2, registry_pb2_grpc, streams_pb2, streams_pb2_grpc
from protos.theseus.tasks.v1 import runs_pb2, runs_pb2_grpc
from services.common.client import connect
from services.common.draining import Draining
from services.common.metrics import Registry, ServerMetrics
from services.common.server import RpcServer, Service
from services.containerd.clients.foreign_shim import connect_shim
from services.containerd.clients.shim_events import ShimEventCodec
from services.containerd.clients.shim_program import ShimPrograms
from services.containerd.containers.store import Container
from services.containerd.content.local import LocalContentStore
from services.containerd.gc.lock import GcLock
from services.containerd.metadata import meta
from services.containerd.rpc.registry import RegistryService
from services.containerd.rpc.runs import RunsService
from services.containerd.rpc.streams import StreamsService, add_streams_to_server
from services.containerd.rpc.tasks import TasksService
from services.containerd.runtimes import OUR_RUNTIMES
from services.containerd.tasks.bundle import Bundles
from services.containerd.tasks.checkpoints import Checkpoints
from services.containerd.tasks.foreign import ForeignRuntimes
from services.containerd.tasks.journal import TaskJournal
from services.containerd.tasks.manager import TaskManager
from services.containerd.tasks.metrics import TaskMetrics
from services.containerd.tasks.shims import Identity, ShimManager
from services.containerd.tasks.undertaker import Undertaker
from services.containerd.typed import TypedValue
from tests.fakes.factory import FakeFactory
from tests.fakes.metadata import Metadata, open_metadata

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from tests.fakes.shim import FakeShim

NS = "test"
SPEC = TypedValue("types.containerd.io/opencontainers/runtime-spec/1/Spec", b'{"root": {}}')


class TaskNode:
    """A containerd that only has tasks, which can be started again on the same root."""

    def __init__(self, root: Path, *, grace_s: float = 5.0, containers_per_shim: int = 1) -> None:
        self.root = root
        self.state = root / "s"
        self.state.mkdir()
        self.socket = self.state / "c.sock"
        self.grace_s = grace_s
        self.containers_per_shim = containers_per_shim
        self.factory = FakeFactory(self.socket)
        self.metadata: Metadata
        self.shims: ShimManager
        self.tasks: TaskManager
        self.bundles = Bundles(self.state)
        self.registry: Registry
        self.metrics: TaskMetrics
        self._stack = AsyncExitStack()
        self._known: set[str] = set()
        self.replacing = False

    def sample(self, name: str, labels: Mapping[str, str] | None = None) -> float | None:
        """A sample of the page of metrics; None if it is not there."""
        for family in text_string_to_metric_families(self.registry.page().decode()):
            for sample in family.samples:
                if sample.name == name and sample.labels == (labels or {}):
                    return float(sample.value)
        return None

    async def start(self, *, serve: bool = True) -> None:
        stack = self._stack = AsyncExitStack()
        self.metadata = await stack.enter_async_context(open_metadata(self.root))
        epoch = await self.metadata.db.write(meta.next_epoch)
        self.registry = Registry()
        self.metrics = TaskMetrics(self.registry)
        journal = TaskJournal(self.metadata.db, self.metadata.journal, ShimEventCodec())
        programs = ShimPrograms(address=self.socket, publisher="false", log_level="info")
        self.shims = await stack.enter_async_context(
            ShimManager(
                bundles=self.bundles,
                journal=journal,
                undertaker=Undertaker(journal, programs=programs),
                connect=connect_shim,
                metrics=self.metrics,
                identity=Identity(secrets.token_hex(8), epoch),
                grace_s=self.grace_s,
                launcher=self.factory if self.replacing else None,
                containers_per_shim=self.containers_per_shim,
            )
        )
        self.tasks = TaskManager(
            containers=self.metadata.containers,
            shims=self.shims,
            launchers=dict.fromkeys(OUR_RUNTIMES, self.factory),
            journal=journal,
            metrics=self.metrics,
            foreign=ForeignRuntimes(programs, connect_shim),
        )
        if serve:
            await self._serve(stack)

    async def _serve(self, stack: AsyncExitStack) -> None:
        content = LocalContentStore(
            self.root, self.metadata.db, events=self.metadata.journal, gc_lock=GcLock()
        )
        checkpoints = Checkpoints(content, self.root / "scratch")
        self.draining = Draining("containerd")
        server = RpcServer(
            tier="containerd",
            socket=self.socket,
            services=[
                Service(
                    tasks_pb2_grpc.add_TasksServicer_to_server,
                    TasksService(self.tasks, self.metadata.containers, checkpoints, self.draining),
                    tasks_pb2.DESCRIPTOR.services_by_name["Tasks"],
                ),
                Service(
                    registry_pb2_grpc.add_RegistryServicer_to_server,
                    RegistryService(self.shims),
                    registry_pb2.DESCRIPTOR.services_by_name["Registry"],
                ),
                Service(
                    runs_pb2_grpc.add_RunsServicer_to_server,
                    RunsService(self.metadata.containers, self.tasks, lambda: None),
                    runs_pb2.DESCRIPTOR.services_by_name["Runs"],
                ),
                Service(
                    add_streams_to_server,
                    StreamsService(self.tasks, self.draining),
                    streams_pb2.DESCRIPTOR.services_by_name["Streams"],
                ),
            ],
            metrics=ServerMetrics(),
        )
        await server.start()
        stack.push_async_callback(server.stop, 0)

    async def stop(self) -> None:
        await self._stack.aclose()

    async def restart(self, *, serve: bool = True) -> None:
        await self.stop()
        await self.start(serve=serve)

    async def close(self) -> None:
        await self.stop()
        await self.factory.cleanup()

    def client(self, namespace: str = NS) -> TaskClient:
        return TaskClient(self.socket, namespace)

    def shim(self, container_id: str) -> FakeShim:
        return self.factory.shims[container_id]

    async def container(self, container_id: str, runtime: str = "io.containerd.runc.v2") -> None:
        """A record to make a task of."""
        await self.metadata.containers.create(
            NS, Container(id=container_id, runtime_name=runtime, spec=SPEC)
        )

    async def running(self, container_id: str) -> FakeShim:
        """A container with a task that runs."""
        await self.container(container_id)
        async with self.client() as client:
            await client.tasks.Create(
                tasks_pb2.CreateTaskRequest(container_id=container_id), timeout=10
            )
            await client.tasks.Start(tasks_pb2.StartRequest(container_id=container_id), timeout=10)
        shim = self.shim(container_id)
        if shim.registering:
            await shim.registered()
            await shim.acknowledged(2)
        return shim

    async def shims_removed(self) -> None:
        """Return once this containerd knows no shim."""
        while known := [*self.shims._shims.values()]:
            await known[0].change(timeout_s=1)

    async def topics(self) -> list[str]:
        """Topics of events about tasks and shims, in order."""
        wanted = ("/tasks/", "/shims/")
        return [topic for topic in await self.metadata.topics() if topic.startswith(wanted)]

    async def until_topic(self, wanted: str) -> Any:
        """The message of the first event of a topic, once there is one."""
        async for entry in self.metadata.journal.read():
            if entry.topic == wanted:
                return entry.event
        raise AssertionError("a journal that is followed does not end")


class TaskClient:
    """Stubs of the node's services on one channel."""

    def __init__(self, socket: Path, namespace: str) -> None:
        self._channel = connect(socket, namespace=namespace)
        self.tasks = tasks_pb2_grpc.TasksStub(self._channel)
        self.runs = runs_pb2_grpc.RunsStub(self._channel)
        self.streams = streams_pb2_grpc.StreamsStub(self._channel)
        self.registry = registry_pb2_grpc.RegistryStub(self._channel)

    async def __aenter__(self) -> TaskClient:
        return self

    async def __aexit__(self, *_exception: object) -> None:
        await self._channel.close()
