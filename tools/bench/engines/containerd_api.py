"""containerd's gRPC API, spoken as any client would, to whichever containerd serves the socket.

A record is made before its snapshot: the record refers to the snapshot, which so is never garbage,
and no lease is needed.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf import any_pb2, empty_pb2

from protos.containerd.services.containers.v1 import containers_pb2, containers_pb2_grpc
from protos.containerd.services.events.v1 import events_pb2, events_pb2_grpc
from protos.containerd.services.images.v1 import images_pb2, images_pb2_grpc
from protos.containerd.services.snapshots.v1 import snapshots_pb2, snapshots_pb2_grpc
from protos.containerd.services.tasks.v1 import tasks_pb2, tasks_pb2_grpc
from protos.containerd.services.version.v1 import version_pb2_grpc
from protos.containerd.types.runc.options import oci_pb2
from protos.containerd.types.task import task_pb2
from tools.bench.engines.engine import CALL_S, BenchError, Plan
from tools.bench.engines.spec import specification

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

    from protos.containerd.types import event_pb2

NAMESPACE = "bench"
SNAPSHOTTER = "overlayfs"
_RUNTIME = "io.containerd.runc.v2"
_SPEC = "types.containerd.io/opencontainers/runtime-spec/1/Spec"
_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.default_authority", "localhost"),
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.use_local_subchannel_pool", 1),
]


def channel_to(socket: Path) -> grpc.aio.Channel:
    """A plain channel, for this and for any other gRPC API."""
    return grpc.aio.insecure_channel(f"unix:{socket}", options=_OPTIONS)


async def version(socket: Path) -> str:
    """What containerd says it is, over a connection of its own."""
    async with channel_to(socket) as channel:
        stub = version_pb2_grpc.VersionStub(channel)
        return (await stub.Version(empty_pb2.Empty(), timeout=CALL_S)).version


class ContainerdApi:
    """Calls over one channel, in the bench's namespace."""

    def __init__(self, socket: Path) -> None:
        self._channel = channel = channel_to(socket)
        self._containers = containers_pb2_grpc.ContainersStub(channel)
        self._events = events_pb2_grpc.EventsStub(channel)
        self._images = images_pb2_grpc.ImagesStub(channel)
        self._snapshots = snapshots_pb2_grpc.SnapshotsStub(channel)
        self._tasks = tasks_pb2_grpc.TasksStub(channel)
        self._call: dict[str, Any] = {
            "metadata": (("containerd-namespace", NAMESPACE),),
            "timeout": CALL_S,
        }

    async def close(self) -> None:
        """Close the channel."""
        await self._channel.close()

    async def record(self, plan: Plan) -> str:
        """A container's record alone."""
        name = uuid.uuid4().hex
        spec = json.dumps(specification(plan, cgroup=f"/{NAMESPACE}/{name}")).encode()
        container = containers_pb2.Container(
            id=name,
            image=plan.picture,
            runtime=containers_pb2.Container.Runtime(name=_RUNTIME, options=_options(plan)),
            spec=any_pb2.Any(type_url=_SPEC, value=spec),
            snapshotter=SNAPSHOTTER,
            snapshot_key=name,
        )
        await self._containers.Create(
            containers_pb2.CreateContainerRequest(container=container), **self._call
        )
        return name

    async def create(self, plan: Plan, *, parent: str, output: str = "") -> str:
        """Record, snapshot of ``parent``, and task; ``output`` is a URI."""
        name = await self.record(plan)
        prepared = await self._snapshots.Prepare(
            snapshots_pb2.PrepareSnapshotRequest(snapshotter=SNAPSHOTTER, key=name, parent=parent),
            **self._call,
        )
        request = tasks_pb2.CreateTaskRequest(
            container_id=name,
            rootfs=prepared.mounts,
            stdout=output,
            stderr=output,
            options=_options(plan),
        )
        await self._tasks.Create(request, **self._call)
        return name

    async def start(self, container: str) -> None:
        """Start the task."""
        await self._tasks.Start(tasks_pb2.StartRequest(container_id=container), **self._call)

    async def run(self, plan: Plan, *, parent: str) -> int:
        """From the record to its removal, with the wait under way before the start."""
        name = await self.create(plan, parent=parent)
        waiting = asyncio.ensure_future(self.wait(name))
        await self.start(name)
        code = await waiting
        await self.remove(name)
        return code

    async def wait(self, container: str) -> int:
        """Exit code of the task."""
        request = tasks_pb2.WaitRequest(container_id=container)
        return (await self._tasks.Wait(request, **self._call)).exit_status

    async def kill(self, container: str, signal: int) -> None:
        """Send a signal to the task."""
        request = tasks_pb2.KillRequest(container_id=container, signal=signal)
        await self._tasks.Kill(request, **self._call)

    async def delete_task(self, container: str) -> int:
        """Delete an ended task; returns its exit code."""
        request = tasks_pb2.DeleteTaskRequest(container_id=container)
        return (await self._tasks.Delete(request, **self._call)).exit_status

    async def remove(self, container: str, *, task: bool = True) -> None:
        """Delete task, snapshot and record."""
        if task:
            await self.delete_task(container)
        await self._snapshots.Remove(
            snapshots_pb2.RemoveSnapshotRequest(snapshotter=SNAPSHOTTER, key=container),
            **self._call,
        )
        await self.delete_record(container)

    async def delete_record(self, container: str) -> None:
        """Delete the record alone."""
        request = containers_pb2.DeleteContainerRequest(id=container)
        await self._containers.Delete(request, **self._call)

    async def execute(self, container: str, command: Sequence[str]) -> int:
        """Add a process, start it, wait, delete it."""
        process = specification(Plan(command=command))["process"]
        spec = any_pb2.Any(
            type_url="types.containerd.io/opencontainers/runtime-spec/1/Process",
            value=json.dumps(process).encode(),
        )
        name = uuid.uuid4().hex[:12]
        which = {"container_id": container, "exec_id": name}
        request = tasks_pb2.ExecProcessRequest(container_id=container, exec_id=name, spec=spec)
        await self._tasks.Exec(request, **self._call)
        waiting = self._tasks.Wait(tasks_pb2.WaitRequest(**which), **self._call)
        await self._tasks.Start(tasks_pb2.StartRequest(**which), **self._call)
        code = (await waiting).exit_status
        await self._tasks.DeleteProcess(tasks_pb2.DeleteProcessRequest(**which), **self._call)
        return code

    async def containers(self) -> int:
        """How many records are listed."""
        request = containers_pb2.ListContainersRequest()
        return len((await self._containers.List(request, **self._call)).containers)

    async def running(self) -> int:
        """How many tasks are listed as running."""
        answer = await self._tasks.List(tasks_pb2.ListTasksRequest(), **self._call)
        return sum(task.status == task_pb2.RUNNING for task in answer.tasks)

    async def inspect(self, container: str) -> None:
        """Fetch a record."""
        request = containers_pb2.GetContainerRequest(id=container)
        answer = await self._containers.Get(request, **self._call)
        if answer.container.id != container:
            raise BenchError(f"asked for {container}, got {answer.container.id}")

    async def remove_image(self, reference: str) -> None:
        """Remove an image, and all that nothing else uses."""
        request = images_pb2.DeleteImageRequest(name=reference, sync=True)
        await self._images.Delete(request, **self._call)

    async def publish(self, topic: str, event: any_pb2.Any) -> None:
        """Publish an event."""
        await self._events.Publish(
            events_pb2.PublishRequest(topic=topic, event=event), **self._call
        )

    async def subscribe(self, topic: str) -> AsyncIterator[event_pb2.Envelope]:
        """Events of a topic from now on."""
        request = events_pb2.SubscribeRequest(filters=[f'topic=="{topic}"'])
        async for envelope in self._events.Subscribe(request, metadata=self._call["metadata"]):
            yield envelope


def _options(plan: Plan) -> any_pb2.Any:
    value = oci_pb2.Options(binary_name=plan.runtime).SerializeToString()
    return any_pb2.Any(type_url="containerd.runc.v1.Options", value=value)
