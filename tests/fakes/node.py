"""A containerd that pretends, for tests of the daemon: the services that the daemon calls, no more.

What it knows (`World`) outlives its server, as the real one's disk and shims do: `stop` and `start`
are a restart. Processes are objects that tests end at will. Faults on demand:

    node.fail("Tasks.Start", code, message, reason="")   the next call fails
    node.lose("Tasks.Start")      the next call works, its answer is lost
    node.block("Tasks.Start")     calls wait until the event returned is set

An attach that starts a process counts as "Streams.Run". With `node.older` set there is none: such
an attach finds no exec, as in a shim of an older version. Runs are served with `node.serves_runs`.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
from dataclasses import dataclass, field

import grpc
from google.protobuf import any_pb2, empty_pb2
from google.rpc import error_details_pb2, status_pb2

from protos.containerd.events import task_pb2 as event_pb2
from protos.containerd.services.containers.v1 import containers_pb2, containers_pb2_grpc
from protos.containerd.services.content.v1 import content_pb2, content_pb2_grpc
from protos.containerd.services.images.v1 import images_pb2, images_pb2_grpc
from protos.containerd.services.snapshots.v1 import snapshots_pb2, snapshots_pb2_grpc
from protos.containerd.services.streaming.v1 import streaming_pb2, streaming_pb2_grpc
from protos.containerd.services.tasks.v1 import tasks_pb2, tasks_pb2_grpc
from protos.containerd.services.transfer.v1 import transfer_pb2_grpc
from protos.containerd.services.version.v1 import version_pb2, version_pb2_grpc
from protos.containerd.types import mount_pb2
from protos.containerd.types.task import task_pb2
from protos.containerd.types.transfer import (
    imagestore_pb2,
    importexport_pb2,
    progress_pb2,
    registry_pb2,
)
from protos.containerd.types.transfer import streaming_pb2 as data_pb2
from protos.theseus.journal.v1 import journal_pb2, journal_pb2_grpc
from protos.theseus.shim.v1 import registry_pb2 as shim_pb2
from protos.theseus.shim.v1 import streams_pb2, streams_pb2_grpc
from protos.theseus.tasks.v1 import runs_pb2, runs_pb2_grpc

NAMESPACE = "theseus"
BUSYBOX = "docker.io/library/busybox:latest"
NANOSECONDS = 1_000_000_000


@dataclass
class Process:
    """A process of a task: init, or an exec."""

    pid: int
    tty: bool = False
    status: int = task_pb2.CREATED
    exit_code: int = 0
    exited_at_ns: int = 0
    lost: str = ""
    spec: dict = field(default_factory=dict)
    stdio: tuple = ("", "", "")
    output: list = field(default_factory=list)  # (stream, bytes)
    finished: bool = False
    input: bytearray = field(default_factory=bytearray)
    input_closed: bool = False
    sizes: list = field(default_factory=list)
    pending: list = field(default_factory=list)  # signals while it is paused
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def wake(self):
        self.changed.set()
        self.changed = asyncio.Event()


class World:
    """What outlives a restart of containerd."""

    def __init__(self, directory):
        self.directory = directory
        self.containers = {}
        self.snapshots = {}  # key -> parent
        self.committed = {}  # chain id -> bytes
        self.tasks = {}  # id -> {exec id: Process}
        self.images = {}  # name -> (media type, digest, size, updated at)
        self.blobs = {}
        self.journal = []
        self.told = []  # topics of the events that the daemon was sent
        self.journal_changed = asyncio.Event()
        self.pids = itertools.count(1000)
        self.clock_ns = itertools.count(2_000_000_000 * NANOSECONDS, 1_000_000)
        self.signals = []  # (container, exec, signal)
        self.killed_by = {9}  # signals that end a process

    def note(self, topic, message):
        """Journal an event."""
        entry = journal_pb2.Entry(seq=len(self.journal) + 1, namespace=NAMESPACE, topic=topic)
        entry.timestamp.FromNanoseconds(next(self.clock_ns))
        entry.event.CopyFrom(
            any_pb2.Any(type_url=message.DESCRIPTOR.full_name, value=message.SerializeToString())
        )
        self.journal.append(entry)
        self.journal_changed.set()
        self.journal_changed = asyncio.Event()

    def process(self, container_id, exec_id=""):
        return self.tasks[container_id][exec_id]

    def end(self, container_id, code, exec_id="", *, tell=True):
        """End a process, as a shim sees and reports it."""
        process = self.process(container_id, exec_id)
        process.status = task_pb2.STOPPED
        process.exit_code = code
        process.exited_at_ns = next(self.clock_ns)
        process.finished = True
        process.wake()
        if tell:
            self.tell_end(container_id, exec_id)

    def tell_end(self, container_id, exec_id=""):
        """Journal the end of a process."""
        process = self.process(container_id, exec_id)
        event = event_pb2.TaskExit(
            container_id=container_id,
            id=exec_id or container_id,
            pid=process.pid,
            exit_status=process.exit_code,
        )
        event.exited_at.FromNanoseconds(process.exited_at_ns)
        self.note("/tasks/exit", event)

    def tell_lost(self, container_id):
        """Journal that nobody knows how init ended."""
        process = self.process(container_id)
        process.status, process.lost = task_pb2.UNKNOWN, "its shim died and nobody saw the end"
        self.note(
            "/tasks/lost",
            shim_pb2.ProcessState(
                container_id=container_id, pid=process.pid, exit_status_lost=True
            ),
        )

    def write(self, container_id, data, stream=1, exec_id=""):
        """Have a process write something."""
        process = self.process(container_id, exec_id)
        process.output.append((stream, data))
        process.wake()

    def add_image(self, name=BUSYBOX, *, config=None, unpacked=True, platform=("linux", "amd64")):
        """Put an image in; returns its id."""
        document = {
            "os": platform[0],
            "architecture": platform[1],
            "created": "2024-05-06T07:08:09.5Z",
            "config": {"Cmd": ["sh"], "Env": ["PATH=/bin"], **(config or {})},
            "rootfs": {"type": "layers", "diff_ids": ["sha256:" + "d" * 64]},
        }
        config_digest = self.add_blob(json.dumps(document).encode())
        manifest = {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": {"mediaType": "c", "digest": config_digest, "size": 100},
            "layers": [{"mediaType": "l", "digest": "sha256:" + "e" * 64, "size": 1000}],
        }
        digest = self.add_blob(json.dumps(manifest).encode())
        self.images[name] = (manifest["mediaType"], digest, 500, next(self.clock_ns))
        if unpacked:
            self.committed["sha256:" + "d" * 64] = 4096
        return config_digest

    def add_blob(self, data):
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        self.blobs[digest] = data
        return digest


class Gate:
    """Where attaching clients wait."""

    def __init__(self):
        self.open = asyncio.Event()
        self.waiting = 0


class FakeNode:
    """The server. One at a time on a socket."""

    def __init__(self, socket, directory):
        self.socket = socket
        self.world = World(directory)
        self.calls = []
        self._faults = {}
        self._lost = {}
        self.no_streams = ""
        self.older = False
        self.serves_runs = False
        self._blocked = {}
        self._server = None
        self.gate = None
        self.stream_channels = {}
        self.reached = {}

    async def __aenter__(self):
        await self.start()
        return self

    async def __aexit__(self, *_):
        await self.stop()

    async def start(self):
        self._server = grpc.aio.server(interceptors=[_Faults(self)])
        add = self._server
        version_pb2_grpc.add_VersionServicer_to_server(_Version(), add)
        containers_pb2_grpc.add_ContainersServicer_to_server(_Containers(self.world), add)
        snapshots_pb2_grpc.add_SnapshotsServicer_to_server(_Snapshots(self.world), add)
        tasks_pb2_grpc.add_TasksServicer_to_server(_Tasks(self.world), add)
        images_pb2_grpc.add_ImagesServicer_to_server(_Images(self.world), add)
        content_pb2_grpc.add_ContentServicer_to_server(_Content(self.world), add)
        journal_pb2_grpc.add_JournalServicer_to_server(_Journal(self), add)
        streams_pb2_grpc.add_StreamsServicer_to_server(_Streams(self), add)
        streaming_pb2_grpc.add_StreamingServicer_to_server(_Streaming(self), add)
        transfer_pb2_grpc.add_TransferServicer_to_server(_Transfer(self), add)
        runs_pb2_grpc.add_RunsServicer_to_server(_Runs(self), add)
        self.socket.unlink(missing_ok=True)
        self._server.add_insecure_port(f"unix:{self.socket}")
        await self._server.start()

    async def stop(self):
        """Go away, as after a SIGKILL: every call under way ends."""
        if self._server is not None:
            await self._server.stop(None)
            self._server = None
            self.socket.unlink(missing_ok=True)

    async def restart(self):
        await self.stop()
        await self.start()

    def fail(self, method, code, message, *, reason="", times=1):
        self._faults.setdefault(method, []).extend([(code, message, reason)] * times)

    def lose(self, method, code=grpc.StatusCode.DEADLINE_EXCEEDED, meanwhile=None):
        """The next call is done and its answer lost, after ``meanwhile`` was called with it."""
        self._lost[method] = (code, meanwhile or (lambda request: None))

    def block(self, method):
        """Calls of a method wait for the event; `await node.called(method)` says one has come."""
        event = self._blocked[method] = asyncio.Event()
        return event

    def refuse_streams(self, why):
        """Attaching fails from now on."""
        self.no_streams = why

    def gate_streams(self):
        """Attaching waits until the gate returned is open."""
        self.gate = Gate()
        return self.gate

    async def called(self, method, times=1):
        """Wait until a method was called so often."""
        while self.calls.count(method) < times:
            event = self.reached.setdefault(method, asyncio.Event())
            await event.wait()
            event.clear()

    async def enter(self, method):
        self.calls.append(method)
        if method in self.reached:
            self.reached[method].set()
        if method in self._blocked:
            await self._blocked[method].wait()

    def take_fault(self, method):
        faults = self._faults.get(method)
        return faults.pop(0) if faults else None

    def take_loss(self, method):
        return self._lost.pop(method, None)


class _Faults(grpc.aio.ServerInterceptor):
    def __init__(self, node):
        self._node = node

    async def intercept_service(self, continuation, details):
        handler = await continuation(details)
        if handler is None or handler.unary_unary is None:
            return handler
        service, method = details.method.split("/")[1:]
        name = f"{service.rpartition('.')[2]}.{method}"

        async def call(request, context):
            await self._node.enter(name)
            fault = self._node.take_fault(name)
            if fault is not None:
                await _abort(context, *fault)
            answer = await handler.unary_unary(request, context)
            if (loss := self._node.take_loss(name)) is not None:
                code, meanwhile = loss
                meanwhile(request)
                await context.abort(code, "the answer was lost")
            return answer

        return grpc.unary_unary_rpc_method_handler(
            call,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )


async def _abort(context, code, message, reason=""):
    trailers = ()
    if reason:
        status = status_pb2.Status(code=code.value[0], message=message)
        status.details.add().Pack(error_details_pb2.ErrorInfo(reason=reason, domain="theseus"))
        trailers = (("grpc-status-details-bin", status.SerializeToString()),)
    await context.abort(code, message, trailers)


async def _not_found(context, what):
    await context.abort(grpc.StatusCode.NOT_FOUND, f"{what} not found")


async def _no_exec(context, exec_id):
    words = f"there is no process {exec_id}"
    status = status_pb2.Status(code=grpc.StatusCode.NOT_FOUND.value[0], message=words)
    status.details.add().Pack(
        error_details_pb2.ResourceInfo(resource_type="exec", resource_name=exec_id)
    )
    trailers = (("grpc-status-details-bin", status.SerializeToString()),)
    await context.abort(grpc.StatusCode.NOT_FOUND, words, trailers)


class _Version(version_pb2_grpc.VersionServicer):
    async def Version(self, request, context):
        return version_pb2.VersionResponse(version="fake")


class _Containers(containers_pb2_grpc.ContainersServicer):
    def __init__(self, world):
        self._world = world

    async def Create(self, request, context):
        if request.container.id in self._world.containers:
            await context.abort(grpc.StatusCode.ALREADY_EXISTS, "container exists")
        self._world.containers[request.container.id] = request.container
        return containers_pb2.CreateContainerResponse(container=request.container)

    async def Get(self, request, context):
        if request.id not in self._world.containers:
            await _not_found(context, f"container {request.id}")
        return containers_pb2.GetContainerResponse(container=self._world.containers[request.id])

    async def Delete(self, request, context):
        if self._world.containers.pop(request.id, None) is None:
            await _not_found(context, f"container {request.id}")
        return empty_pb2.Empty()


class _Snapshots(snapshots_pb2_grpc.SnapshotsServicer):
    def __init__(self, world):
        self._world = world

    def _mounts(self, key):
        root = self._world.directory / key
        (root / "etc").mkdir(parents=True, exist_ok=True)
        (root / "data").mkdir(exist_ok=True)
        (root / "data/file").write_text("of the image")
        (root / "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\nbob:x:1000:1000::/:/bin/sh\n")
        return [mount_pb2.Mount(type="bind", source=str(root), options=["rbind", "rw"])]

    async def Prepare(self, request, context):
        if request.key in self._world.snapshots:
            await context.abort(grpc.StatusCode.ALREADY_EXISTS, "snapshot exists")
        if request.parent and request.parent not in self._world.committed:
            await _not_found(context, f"parent snapshot {request.parent}")
        self._world.snapshots[request.key] = dict(request.labels)
        return snapshots_pb2.PrepareSnapshotResponse(mounts=self._mounts(request.key))

    async def Mounts(self, request, context):
        if request.key not in self._world.snapshots:
            await _not_found(context, f"snapshot {request.key}")
        return snapshots_pb2.MountsResponse(mounts=self._mounts(request.key))

    async def Remove(self, request, context):
        if self._world.snapshots.pop(request.key, None) is None:
            await _not_found(context, f"snapshot {request.key}")
        return empty_pb2.Empty()

    async def Usage(self, request, context):
        if request.key not in self._world.committed:
            await _not_found(context, f"snapshot {request.key}")
        return snapshots_pb2.UsageResponse(size=self._world.committed[request.key])


class _Tasks(tasks_pb2_grpc.TasksServicer):
    def __init__(self, world):
        self._world = world

    async def _process(self, request, context):
        found = self._world.tasks.get(request.container_id, {}).get(request.exec_id)
        if found is None:
            await _not_found(context, f"process {request.exec_id} of {request.container_id}")
        return found

    async def Create(self, request, context):
        if request.container_id not in self._world.containers:
            await _not_found(context, f"container {request.container_id}")
        if request.container_id in self._world.tasks:
            await context.abort(grpc.StatusCode.ALREADY_EXISTS, "task exists")
        stdio = (request.stdin, request.stdout, request.stderr)
        process = Process(next(self._world.pids), tty=request.terminal, stdio=stdio)
        self._world.tasks[request.container_id] = {"": process}
        return tasks_pb2.CreateTaskResponse(container_id=request.container_id, pid=process.pid)

    async def Start(self, request, context):
        process = await self._process(request, context)
        if process.status != task_pb2.CREATED:
            code = grpc.StatusCode.FAILED_PRECONDITION
            await _abort(context, code, "process is not created", "PROCESS_STATE")
        process.status = task_pb2.RUNNING
        process.wake()
        return tasks_pb2.StartResponse(pid=process.pid)

    async def Get(self, request, context):
        process = await self._process(request, context)
        answer = self._state(request.exec_id or request.container_id, process)
        return tasks_pb2.GetResponse(process=answer)

    async def List(self, request, context):
        tasks = self._world.tasks.items()
        return tasks_pb2.ListTasksResponse(
            tasks=[self._state(identity, processes[""]) for identity, processes in tasks]
        )

    @staticmethod
    def _state(identity, process):
        answer = task_pb2.Process(
            id=identity,
            pid=process.pid,
            status=process.status,
            exit_status=process.exit_code,
        )
        if process.exited_at_ns:
            answer.exited_at.FromNanoseconds(process.exited_at_ns)
        return answer

    async def Kill(self, request, context):
        process = await self._process(request, context)
        if process.status == task_pb2.STOPPED:
            await _not_found(context, "process already finished:")
        self._world.signals.append((request.container_id, request.exec_id, request.signal))
        if process.status == task_pb2.PAUSED:
            process.pending.append(request.signal)
        elif request.signal in self._world.killed_by:
            self._world.end(request.container_id, 128 + request.signal, request.exec_id)
        return empty_pb2.Empty()

    async def Resume(self, request, context):
        process = self._world.process(request.container_id)
        if process.status != task_pb2.PAUSED:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "it is not paused")
        process.status = task_pb2.RUNNING
        for signal in process.pending:
            if signal in self._world.killed_by:
                self._world.end(request.container_id, 128 + signal)
        return empty_pb2.Empty()

    async def Wait(self, request, context):
        process = await self._process(request, context)
        while process.status not in (task_pb2.STOPPED, task_pb2.UNKNOWN):
            await process.changed.wait()
        if process.lost:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, process.lost)
        return tasks_pb2.WaitResponse(exit_status=process.exit_code)

    async def Exec(self, request, context):
        task = self._world.tasks.get(request.container_id)
        if task is None:
            await _not_found(context, f"task {request.container_id}")
        if request.exec_id in task:
            await context.abort(grpc.StatusCode.ALREADY_EXISTS, "exec exists")
        task[request.exec_id] = Process(
            next(self._world.pids),
            tty=request.terminal,
            spec=json.loads(request.spec.value),
            stdio=(request.stdin, request.stdout, request.stderr),
        )
        return empty_pb2.Empty()

    async def Delete(self, request, context):
        task = self._world.tasks.get(request.container_id)
        if task is None:
            await _not_found(context, f"task {request.container_id}")
        if task[""].status == task_pb2.RUNNING:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "task is running")
        del self._world.tasks[request.container_id]
        return tasks_pb2.DeleteResponse(exit_status=task[""].exit_code)

    async def DeleteProcess(self, request, context):
        process = await self._process(request, context)
        del self._world.tasks[request.container_id][request.exec_id]
        return tasks_pb2.DeleteResponse(exit_status=process.exit_code)


class _Runs(runs_pb2_grpc.RunsServicer):
    def __init__(self, node):
        self._node = node

    async def Run(self, request, context):
        if not self._node.serves_runs:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "an older version")
        world, task = self._node.world, request.task
        identity = request.container.id
        world.containers[identity] = request.container
        if identity not in world.tasks:
            stdio = (task.stdin, task.stdout, task.stderr)
            process = Process(next(world.pids), tty=task.terminal, stdio=stdio)
            world.tasks[identity] = {"": process}
        process = world.tasks[identity][""]
        if process.status == task_pb2.CREATED:
            process.status = task_pb2.RUNNING
            process.wake()
        return runs_pb2.RunResponse(pid=process.pid)


class _Images(images_pb2_grpc.ImagesServicer):
    def __init__(self, world):
        self._world = world

    def _image(self, name):
        media_type, digest, size, updated_at_ns = self._world.images[name]
        image = images_pb2.Image(name=name)
        image.target.media_type, image.target.digest, image.target.size = media_type, digest, size
        image.updated_at.FromNanoseconds(updated_at_ns)
        return image

    async def List(self, request, context):
        return images_pb2.ListImagesResponse(images=[self._image(n) for n in self._world.images])

    async def Get(self, request, context):
        if request.name not in self._world.images:
            await _not_found(context, f"image {request.name}")
        return images_pb2.GetImageResponse(image=self._image(request.name))

    async def Delete(self, request, context):
        if self._world.images.pop(request.name, None) is None:
            await _not_found(context, f"image {request.name}")
        return empty_pb2.Empty()


class _Content(content_pb2_grpc.ContentServicer):
    def __init__(self, world):
        self._world = world

    async def Read(self, request, context):
        data = self._world.blobs.get(request.digest)
        if data is None:
            await _not_found(context, f"blob {request.digest}")
        for offset in range(0, len(data), 64):  # several messages
            yield content_pb2.ReadContentResponse(offset=offset, data=data[offset : offset + 64])


class _Journal(journal_pb2_grpc.JournalServicer):
    def __init__(self, node):
        self._node = node

    async def Read(self, request, context):
        world = self._node.world
        if request.from_end:
            yield journal_pb2.ReadResponse(next_seq=len(world.journal) + 1)
            if request.no_follow:
                return
        position = max(0, getattr(request, "from") - 1)
        while True:
            while position < len(world.journal):
                entry = world.journal[position]
                position += 1
                if not request.topics or entry.topic in request.topics:
                    world.told.append(entry.topic)
                    yield journal_pb2.ReadResponse(entry=entry, next_seq=position + 1)
            if request.no_follow:
                yield journal_pb2.ReadResponse(next_seq=position + 1)
                return
            await world.journal_changed.wait()


class _Streams(streams_pb2_grpc.StreamsServicer):
    def __init__(self, node):
        self._node = node

    async def Attach(self, requests, context):
        first = await anext(requests)
        start = first.start
        if start.HasField("process"):
            await self._run(start, context)
        if self._node.no_streams:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, self._node.no_streams)
        if (gate := self._node.gate) is not None:
            gate.waiting += 1
            await gate.open.wait()
        task = self._node.world.tasks.get(start.container_id)
        if task is None:
            await _not_found(context, f"task {start.container_id}")
        if start.exec_id not in task:
            await _no_exec(context, start.exec_id)
        process = task[start.exec_id]
        whole = b"".join(data for _, data in process.output)
        offset = len(whole) if start.from_end else start.offset
        yield streams_pb2.AttachResponse(
            started=streams_pb2.Started(
                input_offset=len(process.input),
                terminal=process.tty,
                offset=offset,
                pid=0 if self._node.older else process.pid,
            )
        )
        reading = asyncio.create_task(self._take(requests, process))
        try:
            if not start.output:
                await reading
                return
            async for response in self._output(process, offset):
                if response.HasField("finished") and start.exit and not self._node.older:
                    while process.status != task_pb2.STOPPED:
                        await process.changed.wait()
                    response.finished.exit.status = process.exit_code
                    response.finished.exit.exited_at.FromNanoseconds(process.exited_at_ns)
                    yield response
                    if await reading:
                        del task[start.exec_id]
                    return
                yield response
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    async def _run(self, start, context):
        node = self._node
        if node.older:
            if start.exec_id not in node.world.tasks[start.container_id]:
                await _no_exec(context, start.exec_id)
            return
        await node.enter("Streams.Run")
        if (fault := node.take_fault("Streams.Run")) is not None:
            await _abort(context, *fault)
        task = node.world.tasks[start.container_id]
        if start.exec_id not in task:
            wanted = start.process
            task[start.exec_id] = Process(
                next(node.world.pids),
                tty=wanted.terminal,
                status=task_pb2.RUNNING,
                spec=json.loads(wanted.spec),
                stdio=(wanted.stdin, wanted.stdout, wanted.stderr),
            )
        if (loss := node.take_loss("Streams.Run")) is not None:
            code, meanwhile = loss
            meanwhile(start)
            await context.abort(code, "the answer was lost")

    async def _output(self, process, offset):
        while True:
            position = 0
            for stream, data in list(process.output):
                fresh = data[max(0, offset - position) :]
                position += len(data)
                if fresh:
                    yield streams_pb2.AttachResponse(
                        output=streams_pb2.Output(
                            offset=position - len(fresh), stream=stream, data=fresh
                        )
                    )
            offset = max(offset, position)
            if process.finished:
                yield streams_pb2.AttachResponse(finished=streams_pb2.Finished(offset=offset))
                return
            await process.changed.wait()

    async def _take(self, requests, process):
        async for request in requests:
            kind = request.WhichOneof("message")
            if kind == "input":
                taken = len(process.input)
                process.input += request.input.data[taken - request.input.offset :]
            elif kind == "close_input":
                process.input_closed = True
            elif kind == "forget":
                self._node.calls.append("Streams.Forget")
                return True
            else:
                process.sizes.append((request.resize.width, request.resize.height))
            process.wake()


class _Streaming(streaming_pb2_grpc.StreamingServicer):
    def __init__(self, node):
        self._node = node

    async def Stream(self, requests, context):
        first = await anext(requests)
        identity = streaming_pb2.StreamInit.FromString(first.value).id
        outgoing = asyncio.Queue()
        incoming = asyncio.Queue()
        self._node.stream_channels[identity] = (incoming, outgoing)
        yield any_pb2.Any()
        reading = asyncio.create_task(self._take(requests, incoming))
        try:
            while (message := await outgoing.get()) is not None:
                yield message
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    async def _take(self, requests, incoming):
        async for request in requests:
            incoming.put_nowait(request)
        incoming.put_nowait(None)


class _Transfer(transfer_pb2_grpc.TransferServicer):
    """A pull of any name gives the busybox; an import takes bytes that name the image."""

    def __init__(self, node):
        self._node = node

    async def Transfer(self, request, context):
        _, progress = self._node.stream_channels[request.options.progress_stream]
        store = imagestore_pb2.ImageStore.FromString(request.destination.value)
        assert store.unpacks[0].snapshotter == "overlayfs"
        if request.source.type_url == "containerd.types.transfer.OCIRegistry":
            source = registry_pb2.OCIRegistry.FromString(request.source.value)
            await self._pull(source.reference, progress, context)
        else:
            source = importexport_pb2.ImageImportStream.FromString(request.source.value)
            await self._load(source.stream, store, progress, context)
        progress.put_nowait(None)
        return empty_pb2.Empty()

    async def _pull(self, reference, progress, context):
        if "missing" in reference:
            await _not_found(context, reference)
        layer = "sha256:" + "e" * 64
        for event, done in (("waiting", 0), ("downloading", 500), ("complete", 1000)):
            self._report(progress, event, layer=layer, done=done)
        self._node.world.add_image(reference)

    async def _load(self, stream, store, progress, context):
        incoming, outgoing = self._node.stream_channels[stream]
        data = b""
        while True:
            update = data_pb2.WindowUpdate(update=7)
            outgoing.put_nowait(_pack(update))
            message = await incoming.get()
            if message is None:
                break
            data += data_pb2.Data.FromString(message.value).data
        if not data.startswith(b"image "):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the archive is none")
        name = data.decode().split()[1]
        if name == "untagged":
            name = f"{store.extra_references[0].name}@sha256:{'f' * 64}"
        self._node.world.add_image(name)
        self._report(progress, "saved", name=name)

    @staticmethod
    def _report(progress, event, *, name="", layer="", done=0):
        message = progress_pb2.Progress(event=event, name=name or f"layer ({layer})")
        if layer:
            message.progress, message.total, message.desc.digest = done, 1000, layer
            message.desc.media_type = "application/vnd.oci.image.layer.v1.tar+gzip"
        progress.put_nowait(_pack(message))


def _pack(message):
    return any_pb2.Any(type_url=message.DESCRIPTOR.full_name, value=message.SerializeToString())
