"""A daemon without containers: it keeps its records in memory and plays processes by script.

A container's command is its script: ``echo WORDS``, ``cat`` (input to output until its end), ``exit
N``, ``count N`` (numbers, one a line, each when ``step`` is called), ``sleep`` (until a signal),
``size`` (prints each resize), ``env`` (its own configuration's). Faults are set on the object:
``failures`` by method name, ``cut_after`` bytes of output a stream is cut, ``vanish_after_start``,
and ``restart`` for the whole server.
"""

import asyncio
import contextlib
import itertools
from dataclasses import dataclass, field

from google.protobuf.timestamp_pb2 import Timestamp

from protos.theseus.engine.v1 import (
    containers_pb2,
    containers_pb2_grpc,
    images_pb2,
    images_pb2_grpc,
    system_pb2,
    system_pb2_grpc,
)
from services.common import errors
from services.common.metrics import ServerMetrics
from services.common.request import request_id
from services.common.server import RpcServer, Service

pb = containers_pb2
SIGNALS = {"SIGHUP": 1, "SIGINT": 2, "SIGKILL": 9, "SIGTERM": 15, "SIGUSR1": 10, "": 9}


@dataclass
class Process:
    """What a script makes of streams and signals."""

    command: list
    tty: bool = False
    output: bytearray = field(default_factory=bytearray)
    kinds: list = field(default_factory=list)  # (offset, stream kind) where the kind changes
    taken: bytearray = field(default_factory=bytearray)
    input_closed: bool = False
    signals: list = field(default_factory=list)
    sizes: list = field(default_factory=list)
    steps: int = 0
    code: int | None = None
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    task: asyncio.Task | None = None

    async def write(self, data, kind=pb.STREAM_KIND_STDOUT):
        async with self.changed:
            self.kinds.append((len(self.output), kind))
            self.output += data
            self.changed.notify_all()

    async def update(self, change):
        async with self.changed:
            change()
            self.changed.notify_all()

    async def until(self, condition):
        async with self.changed:
            await self.changed.wait_for(condition)

    async def until_output(self, position):
        """There is output past ``position``, or never will be."""
        await self.until(lambda: len(self.output) > position or self.code is not None)

    def start(self):
        self.task = asyncio.create_task(self._run())

    async def _run(self):
        name, *words = self.command
        code = await getattr(self, f"_{name}")(words)
        await self.update(lambda: setattr(self, "code", code))

    async def _echo(self, words):
        await self.write(" ".join(words).encode() + b"\n")
        return 0

    async def _err(self, words):
        await self.write(" ".join(words).encode() + b"\n", pb.STREAM_KIND_STDERR)
        return 0

    async def _exit(self, words):
        return int(words[0])

    async def _cat(self, words):
        done = 0
        while True:
            await self.until(lambda done=done: len(self.taken) > done or self.input_closed)
            piece = bytes(self.taken[done:])
            done += len(piece)
            if piece:
                await self.write(piece)
            elif self.input_closed:
                return 0

    async def _count(self, words):
        for number in range(int(words[0])):
            await self.until(lambda number=number: self.steps > number)
            await self.write(f"{number}\n".encode())
        return 0

    async def _sleep(self, words):
        await self.until(lambda: self.signals)
        return 128 + SIGNALS[self.signals[0]]

    async def _trap(self, words):
        """Prints each signal; the third ends it with 3."""
        for number in range(int(words[0])):
            await self.until(lambda number=number: len(self.signals) > number)
            await self.write(f"{self.signals[number]}\n".encode())
        return 3

    async def _size(self, words):
        for number in range(int(words[0])):
            await self.until(lambda number=number: len(self.sizes) > number)
            width, height = self.sizes[number]
            await self.write(f"{width}x{height}\r\n".encode())
        return 0


@dataclass
class Record:
    """A container."""

    message: pb.Container
    process: Process | None = None
    removed: bool = False


class FakeDaemon(containers_pb2_grpc.ContainersServicer):
    """Serves on ``socket`` between ``start`` and ``stop``; ``restart`` keeps all records."""

    def __init__(self, socket):
        self.socket = socket
        self.containers = {}
        self.execs = {}
        self.images = {}
        self.pullable = {}
        self.failures = {}
        self.requests = []
        self.request_ids = []
        self.cut_after = None
        self.vanish_after_start = False
        self.hold_start = None
        self.vanish_at = ""  # a step of an exec in one call at which the daemon restarts
        self.attaches = 0
        self.loaded = b""
        self._volumes = {}
        self._server = None

    async def start(self):
        add = [
            (
                containers_pb2_grpc.add_ContainersServicer_to_server,
                self,
                containers_pb2,
                "Containers",
            ),
            (
                containers_pb2_grpc.add_ExecsServicer_to_server,
                _Execs(self),
                containers_pb2,
                "Execs",
            ),
            (images_pb2_grpc.add_ImagesServicer_to_server, _Images(self), images_pb2, "Images"),
            (system_pb2_grpc.add_SystemServicer_to_server, _System(self), system_pb2, "System"),
            (system_pb2_grpc.add_VolumesServicer_to_server, _Volumes(self), system_pb2, "Volumes"),
        ]
        self._server = RpcServer(
            tier="daemon",
            socket=self.socket,
            services=[
                Service(function, servicer, module.DESCRIPTOR.services_by_name[name])
                for function, servicer, module, name in add
            ],
            metrics=ServerMetrics(),
            reflection=False,
        )
        await self._server.start()

    async def stop(self):
        await self._server.stop(0)

    async def restart(self, away_s=0.0):
        """Break every connection and call; containers go on."""
        await self.stop()
        await asyncio.sleep(away_s)
        await self.start()

    async def close(self):
        await self.stop()
        processes = [record.process for record in self.containers.values()]
        for process in [*processes, *self.execs.values()]:
            if process is not None and process.task is not None:
                process.task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await process.task

    async def reached(self, step):
        """Restart in the midst of a call, if that is to be at this step."""
        if self.vanish_at == step:
            self.vanish_at = ""
            self._restarting = asyncio.create_task(self.restart(away_s=0.8))
            await asyncio.Event().wait()  # until this call is cancelled with all others

    def called(self, method, request):
        self.requests.append((method, request))
        self.request_ids.append(request_id.get())
        if failures := self.failures.get(method):
            raise failures.pop(0)

    def asked(self, method):
        """Requests of one method."""
        return [request for name, request in self.requests if name == method]

    def find(self, name):
        for identity, record in self.containers.items():
            if (
                not record.removed
                and name
                and (identity.startswith(name) or record.message.name == name)
            ):
                return record
        raise errors.NotFound(f"container '{name}' does not exist", resource=("container", name))

    # Containers

    async def Create(self, request, context):
        self.called("Create", request)
        if request.config.image not in self.images:
            raise errors.NotFound(
                f"image '{request.config.image}' does not exist: pull it first",
                resource=("image", request.config.image),
            )
        identity = f"{len(self.containers):064x}"[::-1]
        name = request.name or f"name{len(self.containers)}"
        if any(r.message.name == name and not r.removed for r in self.containers.values()):
            raise errors.AlreadyExists(f"name '{name}' is in use by another container")
        message = pb.Container(
            id=identity,
            name=name,
            config=request.config,
            image_id="sha256:" + "1" * 64,
            state=pb.CONTAINER_STATE_CREATED,
            args=request.config.command,
            ports=request.config.ports,
        )
        message.created_at.GetCurrentTime()
        self.containers[identity] = Record(
            message, Process(list(request.config.command) or ["sleep"], request.config.tty)
        )
        return pb.CreateContainerResponse(id=identity, name=name)

    async def Start(self, request, context):
        self.called("Start", request)
        if self.hold_start is not None:
            await self.hold_start.wait()
        record = self.find(request.container)
        if record.message.state == pb.CONTAINER_STATE_RUNNING:
            return pb.StartContainerResponse()
        record.message.state = pb.CONTAINER_STATE_RUNNING
        record.message.pid = 4242
        record.message.started_at.GetCurrentTime()
        if record.process.code is not None:  # it ran before
            record.process = Process(record.process.command, record.process.tty)
        record.process.start()
        record.process.task.add_done_callback(lambda _: self._exited(record))
        if self.vanish_after_start:
            self._restarting = asyncio.create_task(self.restart())
            await asyncio.Event().wait()  # until this call is cancelled with all others
        return pb.StartContainerResponse()

    def _exited(self, record):
        if record.process.task.cancelled():
            return
        message = record.message
        message.state = pb.CONTAINER_STATE_EXITED
        message.pid = 0
        message.exit.code = record.process.code
        message.exit.finished_at.GetCurrentTime()
        record.removed = message.config.auto_remove

    async def Stop(self, request, context):
        self.called("Stop", request)
        await self._signal(self.find(request.container), "SIGTERM")
        return pb.StopContainerResponse()

    async def Kill(self, request, context):
        self.called("Kill", request)
        record = self.find(request.container)
        if record.message.state != pb.CONTAINER_STATE_RUNNING:
            raise errors.FailedPrecondition(f"container {record.message.name} is not running")
        await self._signal(record, request.signal)
        return pb.KillContainerResponse()

    async def _signal(self, record, name):
        await record.process.update(lambda: record.process.signals.append(name))

    async def Remove(self, request, context):
        self.called("Remove", request)
        record = self.find(request.container)
        if record.message.state == pb.CONTAINER_STATE_RUNNING and not request.force:
            raise errors.FailedPrecondition("it runs: stop it first")
        record.removed = True
        return pb.RemoveContainerResponse(id=record.message.id)

    async def Wait(self, request, context):
        self.called("Wait", request)
        record = self.containers.get(request.container) or self.find(request.container)
        await record.process.until(lambda: record.process.code is not None)
        return pb.WaitContainerResponse(exit=pb.ExitStatus(code=record.process.code))

    async def Get(self, request, context):
        self.called("Get", request)
        return pb.GetContainerResponse(container=self.find(request.container).message)

    async def List(self, request, context):
        self.called("List", request)
        found = [
            record.message
            for record in reversed(self.containers.values())
            if not record.removed
            and (request.all or record.message.state == pb.CONTAINER_STATE_RUNNING)
        ]
        return pb.ListContainersResponse(containers=found)

    async def Logs(self, request, context):
        copy = pb.LogsRequest()
        copy.CopyFrom(request)
        self.called("Logs", copy)
        process = self.find(request.container).process
        skip, sent = request.offset, 0
        done = 0
        while True:
            lines = bytes(process.output).splitlines(keepends=True)
            first = 0 if not request.HasField("tail") else max(len(lines) - request.tail, 0)
            if request.HasField("since"):
                first = request.since.seconds - 1000
            for number, line in enumerate(lines[max(first, done) :], max(first, done)):
                sent += len(line)
                if sent <= skip:
                    continue
                if self.cut_after is not None and sent - skip > self.cut_after:
                    self.cut_after = None
                    raise errors.Unavailable("going away")
                entry = pb.LogEntry(
                    timestamp=Timestamp(seconds=1000 + number),
                    stream=pb.STREAM_KIND_STDOUT,
                    data=line[max(skip - sent, -len(line)) :] if sent > skip else line,
                )
                yield pb.LogsResponse(entries=[entry])
            done = len(lines)
            size = len(process.output)
            if not request.follow or process.code is not None:
                return
            await process.until_output(size)

    async def Attach(self, requests, context):
        async for response in self.attach(requests, "Attach"):
            yield response

    async def attach(self, requests, method):
        first = await anext(requests)
        start = first.start
        self.called(method, start)
        self.attaches += 1
        process = (
            self.execs[start.exec_id]
            if start.exec_id
            else (self.containers.get(start.container) or self.find(start.container)).process
        )
        reader = asyncio.create_task(self._take(requests, process))
        try:
            position = len(process.output) if start.from_end else start.offset
            yield pb.AttachResponse(
                started=pb.AttachStarted(
                    input_offset=len(process.taken), terminal=process.tty, offset=position
                )
            )
            begin = position
            while True:
                await process.until_output(position)
                for offset, kind, data in self.pieces(process, position):
                    if self.cut_after is not None and position - begin >= self.cut_after:
                        self.cut_after = None
                        raise errors.Unavailable("going away")
                    output = pb.AttachOutput(offset=offset, stream=kind, data=data)
                    yield pb.AttachResponse(output=output)
                    position = offset + len(data)
                if process.code is not None and position == len(process.output):
                    yield pb.AttachResponse(finished=pb.AttachFinished(offset=position))
                    return
        finally:
            reader.cancel()

    def pieces(self, process, position):
        marks = [*process.kinds, (len(process.output), 0)]
        for (begin, kind), (end, _) in itertools.pairwise(marks):
            if end > position:
                first = max(begin, position)
                yield first, kind, bytes(process.output[first:end])

    async def _take(self, requests, process):
        async for request in requests:
            kind = request.WhichOneof("message")
            async with process.changed:
                if kind == "input":
                    assert request.input.offset <= len(process.taken), "a hole in the input"
                    process.taken += request.input.data[len(process.taken) - request.input.offset :]
                elif kind == "close_input":
                    process.input_closed = True
                elif kind == "resize":
                    process.sizes.append((request.resize.width, request.resize.height))
                process.changed.notify_all()


class _Execs(containers_pb2_grpc.ExecsServicer):
    def __init__(self, daemon):
        self._daemon = daemon

    async def Create(self, request, context):
        self._daemon.called("ExecCreate", request)
        return pb.CreateExecResponse(exec_id=self._create(request))

    def _create(self, request):
        record = self._daemon.find(request.container)
        if record.message.state != pb.CONTAINER_STATE_RUNNING:
            raise errors.FailedPrecondition(f"container {record.message.name} is not running")
        identity = f"exec{len(self._daemon.execs)}"
        self._daemon.execs[identity] = Process(list(request.command), request.tty)
        return identity

    async def Run(self, request, context):
        daemon = self._daemon
        daemon.called("ExecRun", request.exec)
        identity = self._create(request.exec)
        await daemon.reached("created")
        yield pb.RunExecResponse(exec_id=identity)
        await daemon.reached("told")
        daemon.called("ExecStart", pb.StartExecRequest(exec_id=identity))
        process = daemon.execs[identity]
        process.start()
        await daemon.reached("started")
        position = 0
        while process.code is None or position < len(process.output):
            await process.until_output(position)
            for offset, kind, data in daemon.pieces(process, position):
                output = pb.AttachOutput(offset=offset, stream=kind, data=data)
                yield pb.RunExecResponse(output=output)
                position = offset + len(data)
                await daemon.reached("output")
        yield pb.RunExecResponse(exit=pb.ExitStatus(code=process.code))

    async def Start(self, request, context):
        self._daemon.called("ExecStart", request)
        process = self._daemon.execs[request.exec_id]
        if process.task is None:
            process.start()
        return pb.StartExecResponse(pid=4243)

    async def Wait(self, request, context):
        self._daemon.called("ExecWait", request)
        process = self._daemon.execs[request.exec_id]
        await process.until(lambda: process.code is not None)
        return pb.WaitExecResponse(exit=pb.ExitStatus(code=process.code))

    async def Attach(self, requests, context):
        async for response in self._daemon.attach(requests, "ExecAttach"):
            yield response


class _Images(images_pb2_grpc.ImagesServicer):
    def __init__(self, daemon):
        self._daemon = daemon

    async def Pull(self, request, context):
        self._daemon.called("Pull", request)
        if request.reference not in self._daemon.pullable:
            raise errors.NotFound(f"image '{request.reference}' does not exist in its registry")
        name = "sha256:" + "a" * 64
        for status in ("fetching", "unpacking", "done"):
            yield images_pb2.PullImageResponse(
                layers=[
                    images_pb2.LayerProgress(
                        name=name, status=status, current_bytes=500, total_bytes=1000
                    )
                ]
            )
        image = self._daemon.pullable[request.reference]
        self._daemon.images[request.reference] = image
        yield images_pb2.PullImageResponse(image=image)

    async def Load(self, requests, context):
        pieces = [request.data async for request in requests]
        self._daemon.called("Load", len(pieces))
        self._daemon.loaded = b"".join(pieces)
        return images_pb2.LoadImageResponse(
            images=[images_pb2.Image(id="sha256:1", references=["docker.io/library/loaded:1"])]
        )

    async def List(self, request, context):
        self._daemon.called("ListImages", request)
        return images_pb2.ListImagesResponse(images=self._daemon.images.values())

    async def Remove(self, request, context):
        self._daemon.called("RemoveImage", request)
        if request.image not in self._daemon.images:
            raise errors.NotFound(f"image '{request.image}' does not exist")
        image = self._daemon.images.pop(request.image)
        return images_pb2.RemoveImageResponse(untagged=image.references, deleted=[image.id])

    async def Get(self, request, context):
        self._daemon.called("GetImage", request)
        if request.image not in self._daemon.images:
            raise errors.NotFound(f"image '{request.image}' does not exist")
        return images_pb2.GetImageResponse(image=self._daemon.images[request.image])


class _System(system_pb2_grpc.SystemServicer):
    def __init__(self, daemon):
        self._daemon = daemon

    async def Version(self, request, context):
        self._daemon.called("Version", request)
        return system_pb2.VersionResponse(version="9.9", python="3.11", kernel="6", containerd="")

    async def Info(self, request, context):
        self._daemon.called("Info", request)
        return system_pb2.InfoResponse(
            containers=3,
            running=1,
            runtimes=[
                system_pb2.RuntimeInfo(name="runc", usable=True),
                system_pb2.RuntimeInfo(name="crun", reason="it refuses this host"),
            ],
            default_runtime="runc",
        )


class _Volumes(system_pb2_grpc.VolumesServicer):
    def __init__(self, daemon):
        self._volumes = daemon._volumes
        self._daemon = daemon

    async def Create(self, request, context):
        name = request.name or "anonymous"
        self._volumes[name] = system_pb2.Volume(name=name, labels=request.labels)
        return system_pb2.CreateVolumeResponse(volume=self._volumes[name])

    async def List(self, request, context):
        return system_pb2.ListVolumesResponse(volumes=self._volumes.values())

    async def Remove(self, request, context):
        if request.name not in self._volumes:
            raise errors.NotFound(f"volume '{request.name}' does not exist")
        del self._volumes[request.name]
        return system_pb2.RemoveVolumeResponse()
