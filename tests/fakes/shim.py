"""A fake shim: the services of a real one on a real socket, without a runtime below.

It lives in the test's process. Who it is (pid, start time) is a stand-in child process, so that its
death can be had without losing the object; its containers' processes are children as well, so that
whoever kills them kills something. Faults are set by method name.
"""

from __future__ import annotations

import asyncio
import json
import signal
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.empty_pb2 import Empty
from google.protobuf.timestamp_pb2 import Timestamp

from protos.containerd.events import task_pb2 as events_pb2
from protos.containerd.task.v3 import shim_pb2 as pb
from protos.containerd.task.v3 import shim_pb2_grpc
from protos.containerd.types.task import task_pb2
from protos.theseus.shim.v1 import (
    control_pb2,
    control_pb2_grpc,
    registry_pb2,
    registry_pb2_grpc,
    streams_pb2,
    streams_pb2_grpc,
)
from services.common import linux

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

STATUS = {
    "created": task_pb2.CREATED,
    "running": task_pb2.RUNNING,
    "paused": task_pb2.PAUSED,
    "stopped": task_pb2.STOPPED,
}
MESSAGES = {
    "/tasks/create": events_pb2.TaskCreate,
    "/tasks/start": events_pb2.TaskStart,
    "/tasks/exec-added": events_pb2.TaskExecAdded,
    "/tasks/exec-started": events_pb2.TaskExecStarted,
    "/tasks/exit": events_pb2.TaskExit,
    "/tasks/delete": events_pb2.TaskDelete,
    "/tasks/paused": events_pb2.TaskPaused,
    "/tasks/resumed": events_pb2.TaskResumed,
}


@dataclass
class FakeProcess:
    exec_id: str
    status: str = "created"
    child: asyncio.subprocess.Process | None = None
    exit_status: int | None = None
    exited_at_ns: int = 0
    request: Any = None
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def pid(self) -> int:
        return self.child.pid if self.child is not None else 0


class FakeShim(
    shim_pb2_grpc.TaskServicer, control_pb2_grpc.ControlServicer, streams_pb2_grpc.StreamsServicer
):
    """One shim of one container.

    Attributes:
        faults: method name -> the status that it fails with.
        hanging: methods that never answer.
        calls: every method called, in order.
        registering: whether it registers, and again.
        acked: the last number that containerd acknowledged.
        ignore_acks: acknowledgements are not heard.
        runtime: the program that its state names.
        unforgotten: what it has deleted and the runtime has not; kept by a shim that dies over it.
        forgetting: the runtime forgets at once what is deleted.
        welcomes: every Welcome received.
        endings: how each registration stream ended.
    """

    def __init__(
        self,
        *,
        namespace: str,
        id: str,
        bundle: Path,
        socket: Path,
        registry: Path,
        instance_id: str,
    ) -> None:
        self.namespace = namespace
        self.id = id
        self.bundle = bundle
        self.socket = socket
        self.registry = registry
        self.instance_id = instance_id
        self.faults: dict[str, grpc.StatusCode] = {}
        self.hanging: set[str] = set()
        self.calls: list[str] = []
        self.registering = True
        self.ignore_acks = False
        self.tells_streams = False
        self.runtime = "true"
        self.forgetting = True
        self.unforgotten: list[FakeProcess] = []
        self.acked = 0
        self.last_seq = 0
        self.welcomes: list[registry_pb2.Welcome] = []
        self.endings: list[grpc.StatusCode] = []
        self.processes: dict[str, FakeProcess] = {}
        self.page = b"# HELP fake_up One.\n# TYPE fake_up gauge\nfake_up 1.0\n"
        self.attached: list[streams_pb2.AttachRequest] = []
        self.detached = asyncio.Event()
        self.protocol = (1, 1)
        self.on_create: Any = None
        self.generation = 0
        self.refusal = ""
        self.programs: list[list[str]] = []
        self._reexecuting: asyncio.Task[None] | None = None
        self._stand_in: asyncio.subprocess.Process | None = None
        self._start_time = 0
        self._server: grpc.aio.Server | None = None
        self._registration: asyncio.Task[None] | None = None
        self._stopping = False
        self._news = asyncio.Event()
        self._called = asyncio.Event()

    @property
    def pid(self) -> int:
        assert self._stand_in is not None
        return self._stand_in.pid

    @property
    def start_time(self) -> int:
        return self._start_time

    @property
    def alive(self) -> bool:
        if self._stand_in is None:
            return False
        return linux.process_start_time(self._stand_in.pid) == self._start_time

    async def start(self) -> None:
        """Come up: process, socket, shim.json, registration."""
        self._stand_in = await asyncio.create_subprocess_exec("sleep", "infinity")
        start_time = linux.process_start_time(self._stand_in.pid)
        assert start_time is not None
        self._start_time = start_time
        await self.serve()
        record = json.loads((self.bundle / "shim.json").read_text())
        record |= {"pid": self.pid, "start_time": self.start_time}
        self._write("shim.json", record)
        (self.bundle / "spool").mkdir(exist_ok=True)
        self.write_state()
        self._registration = asyncio.create_task(self._register_forever())

    async def serve(self) -> None:
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        shim_pb2_grpc.add_TaskServicer_to_server(self, self._server)
        control_pb2_grpc.add_ControlServicer_to_server(self, self._server)
        streams_pb2_grpc.add_StreamsServicer_to_server(self, self._server)
        self.socket.unlink(missing_ok=True)
        assert self._server.add_insecure_port(f"unix:{self.socket}")
        await self._server.start()

    async def stop_serving(self) -> None:
        if self._server is not None:
            await self._server.stop(0)
            self._server = None

    async def stop_registering(self) -> None:
        if self._registration is not None:
            self._stopping = True  # a call that ends at the same time swallows the cancellation
            self._registration.cancel()
            with suppress(asyncio.CancelledError):
                await self._registration
            self._registration = None
            self._stopping = False

    async def die(self) -> None:
        """What SIGKILL does to a shim: its containers' processes run on."""
        await self.stop_registering()
        await self.stop_serving()
        if self._stand_in is not None:
            if self.alive:
                self._stand_in.kill()
            await self._stand_in.wait()

    def succeed(self, dead: FakeShim) -> None:
        """Take over from a shim that died; before ``start``."""
        self.processes = dead.processes
        self.last_seq, self.acked = dead.last_seq, dead.acked

    async def Info(self, request: Any, context: Any) -> control_pb2.InfoResponse:
        await self._enter("Info", context)
        return control_pb2.InfoResponse(
            pid=self.pid, version=f"v{self.generation}", generation=self.generation
        )

    async def Reexec(self, request: Any, context: Any) -> control_pb2.ReexecResponse:
        await self._enter("Reexec", context)
        if self.refusal:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, self.refusal)
        if request.generation == self.generation:
            return control_pb2.ReexecResponse(
                version=f"v{self.generation}", generation=self.generation, downtime_us=1500
            )
        self.programs.append(list(request.program))
        self.generation = request.generation
        self._reexecuting = asyncio.create_task(self.reexec())
        await asyncio.Event().wait()  # the connection breaks first

    async def reexec(self) -> None:
        """What a re-execution looks like: same process, every connection cut, then back."""
        await self.stop_registering()
        await self.stop_serving()
        await self.serve()
        self._registration = asyncio.create_task(self._register_forever())

    async def cleanup(self) -> None:
        await self.die()
        for process in self.processes.values():
            if process.child is not None and process.child.returncode is None:
                process.child.kill()
                await process.child.wait()

    async def exit(self, exec_id: str = "", status: int = 0) -> None:
        """A process ends by itself with ``status``."""
        process = self.processes[exec_id]
        if process.child is not None and process.child.returncode is None:
            process.child.kill()
            await process.child.wait()
        process.status, process.exit_status = "stopped", status
        process.exited_at_ns = time.time_ns()
        self.emit(
            "/tasks/exit",
            container_id=self.id,
            id=exec_id or self.id,
            pid=process.pid,
            exit_status=status,
            exited_at_ns=process.exited_at_ns,
        )
        self.write_state()
        process.ended.set()

    def emit(self, topic: str, **fields: object) -> int:
        """Put an event on the spool and offer it."""
        self.last_seq += 1
        event = {
            "seq": self.last_seq,
            "timestamp_ns": time.time_ns(),
            "topic": topic,
            "fields": {**fields, "not_in_the_message": 1},
        }
        self._write(f"spool/{self.last_seq}", event)
        self._news.set()
        return self.last_seq

    def write_state(self) -> None:
        """state.json, as a real shim keeps it."""
        processes = [
            {
                "exec_id": process.exec_id,
                "pid": process.pid,
                "start_time": linux.process_start_time(process.pid) or 0,
                "status": process.status,
                "exit_status": process.exit_status,
                "exited_at_ns": process.exited_at_ns,
            }
            for process in (*self.processes.values(), *self.unforgotten)
        ]
        container = {
            "id": self.id,
            "runtime": self.runtime,
            "runtime_root": str(self.bundle),
            "processes": processes,
        }
        self._write("state.json", {"epoch": 1, "containers": [container] if processes else []})

    async def acknowledged(self, seq: int) -> None:
        while self.acked < seq:
            self._news.clear()
            await self._news.wait()

    async def called(self, method: str) -> None:
        while method not in self.calls:
            self._called.clear()
            await self._called.wait()

    async def refused(self) -> None:
        """Return once a registration has ended with an error."""
        while not self.endings:
            self._news.clear()
            await self._news.wait()

    async def registered(self, times: int = 1) -> None:
        while len(self.welcomes) < times:
            self._news.clear()
            await self._news.wait()

    def hello(self) -> registry_pb2.Hello:
        return registry_pb2.Hello(
            namespace=self.namespace,
            id=self.id,
            instance_id=self.instance_id,
            pid=self.pid,
            pid_start_time=self.start_time,
            boot_id=linux.boot_id(),
            address=f"unix://{self.socket}",
            version="fake",
            protocol_min=self.protocol[0],
            protocol_max=self.protocol[1],
            processes=[
                registry_pb2.ProcessState(
                    container_id=self.id,
                    exec_id=process.exec_id,
                    pid=process.pid,
                    status=process.status,
                    exit_status=process.exit_status or 0,
                    streams=registry_pb2.ProcessState.Streams(
                        stdout=getattr(process.request, "stdout", "")
                    )
                    if self.tells_streams
                    else None,
                )
                for process in self.processes.values()
            ],
            first_seq=self.acked + 1,
            last_seq=self.last_seq,
            bundle=str(self.bundle),
        )

    async def _register_forever(self) -> None:
        while not self._stopping:
            if self.registering and self.registry.exists():
                async with grpc.aio.insecure_channel(
                    f"unix:{self.registry}", options=[("grpc.use_local_subchannel_pool", 1)]
                ) as channel:
                    try:
                        await self._register(registry_pb2_grpc.RegistryStub(channel))
                    except grpc.aio.AioRpcError as error:
                        self.endings.append(error.code())
                    except asyncio.InvalidStateError:  # the stream ended before a write
                        continue
                    except FileNotFoundError:  # the bundle is gone from under it
                        return
            self._news.set()
            await asyncio.sleep(0.01)

    async def _register(self, stub: Any) -> None:
        call = stub.Register()
        await call.write(registry_pb2.RegisterRequest(hello=self.hello()))
        answer = await call.read()
        self.welcomes.append(answer.welcome)
        self._news.set()
        sent = answer.welcome.last_acked_seq
        self._forget(sent)
        reading = asyncio.create_task(self._read_acks(call))
        try:
            while not reading.done():
                while sent < self.last_seq:
                    sent += 1
                    await call.write(registry_pb2.RegisterRequest(event=self._load(sent)))
                await asyncio.wait([reading], timeout=0.005)
            await reading
        finally:
            reading.cancel()
            call.cancel()

    async def _read_acks(self, call: Any) -> None:
        while (answer := await call.read()) is not grpc.aio.EOF:
            if not self.ignore_acks:
                self._forget(answer.ack.seq)

    def _forget(self, seq: int) -> None:
        for number in range(self.acked + 1, seq + 1):
            (self.bundle / "spool" / str(number)).unlink(missing_ok=True)
        self.acked = max(self.acked, seq)
        self._news.set()

    def _load(self, seq: int) -> registry_pb2.Event:
        spooled = json.loads((self.bundle / "spool" / str(seq)).read_text())
        message = MESSAGES[spooled["topic"]]()
        for name, value in spooled["fields"].items():
            if name.endswith("_ns"):
                getattr(message, name.removesuffix("_ns")).FromNanoseconds(value)
            elif name in message.DESCRIPTOR.fields_by_name:
                setattr(message, name, value)
        timestamp = Timestamp()
        timestamp.FromNanoseconds(spooled["timestamp_ns"])
        return registry_pb2.Event(
            seq=seq,
            timestamp=timestamp,
            topic=spooled["topic"],
            event=AnyMessage(
                type_url=message.DESCRIPTOR.full_name, value=message.SerializeToString()
            ),
        )

    def _write(self, name: str, data: object) -> None:
        draft = self.bundle / f"{name}.tmp"
        draft.write_text(json.dumps(data))
        draft.rename(self.bundle / name)

    async def _enter(self, method: str, context: Any) -> None:
        self.calls.append(method)
        self._called.set()
        if method in self.hanging:
            await asyncio.Event().wait()
        if method in self.faults:
            await context.abort(self.faults[method], f"{method} fails on demand")

    async def _process(self, exec_id: str, context: Any) -> FakeProcess:
        process = self.processes.get(exec_id)
        if process is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no process '{exec_id}'")
        return process  # type: ignore[return-value]

    async def Create(self, request: Any, context: Any) -> pb.CreateTaskResponse:
        await self._enter("Create", context)
        if self.on_create is not None and request.checkpoint:
            self.on_create((Path(request.checkpoint) / "core.img").read_bytes())
        init = FakeProcess("", request=request)
        init.child = await asyncio.create_subprocess_exec("sleep", "infinity")
        self.processes[""] = init
        self.write_state()
        self.emit("/tasks/create", container_id=self.id, bundle=str(self.bundle), pid=init.pid)
        return pb.CreateTaskResponse(pid=init.pid)

    async def Start(self, request: Any, context: Any) -> pb.StartResponse:
        await self._enter("Start", context)
        process = await self._process(request.exec_id, context)
        if process.status != "created":
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "already started")
        if process.child is None:
            process.child = await asyncio.create_subprocess_exec("sleep", "infinity")
        process.status = "running"
        self.write_state()
        if request.exec_id:
            self.emit(
                "/tasks/exec-started",
                container_id=self.id,
                exec_id=request.exec_id,
                pid=process.pid,
            )
        else:
            self.emit("/tasks/start", container_id=self.id, pid=process.pid)
        return pb.StartResponse(pid=process.pid)

    async def Exec(self, request: Any, context: Any) -> Empty:
        await self._enter("Exec", context)
        if request.exec_id in self.processes:
            await context.abort(grpc.StatusCode.ALREADY_EXISTS, "exec id is taken")
        self.processes[request.exec_id] = FakeProcess(request.exec_id, request=request)
        self.write_state()
        self.emit("/tasks/exec-added", container_id=self.id, exec_id=request.exec_id)
        return Empty()

    async def Kill(self, request: Any, context: Any) -> Empty:
        await self._enter("Kill", context)
        process = await self._process(request.exec_id, context)
        if process.status == "stopped":
            await context.abort(grpc.StatusCode.NOT_FOUND, "process already finished")
        if request.signal == signal.SIGKILL:
            await self.exit(request.exec_id, 128 + signal.SIGKILL)
        return Empty()

    async def Wait(self, request: Any, context: Any) -> pb.WaitResponse:
        await self._enter("Wait", context)
        process = await self._process(request.exec_id, context)
        await process.ended.wait()
        return pb.WaitResponse(
            exit_status=process.exit_status or 0, exited_at=_time(process.exited_at_ns)
        )

    async def Delete(self, request: Any, context: Any) -> pb.DeleteResponse:
        await self._enter("Delete", context)
        process = await self._process(request.exec_id, context)
        if process.status == "running":
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "process is running")
        if process.child is not None and process.child.returncode is None:
            process.child.kill()
            await process.child.wait()
        del self.processes[request.exec_id]
        if not request.exec_id and not self.forgetting:
            process.status = "deleted"
            self.unforgotten.append(process)
        self.write_state()
        self.emit(
            "/tasks/delete",
            container_id=self.id,
            id=request.exec_id,
            pid=process.pid,
            exit_status=process.exit_status or 0,
            exited_at_ns=process.exited_at_ns,
        )
        return pb.DeleteResponse(
            pid=process.pid,
            exit_status=process.exit_status or 0,
            exited_at=_time(process.exited_at_ns),
        )

    async def State(self, request: Any, context: Any) -> pb.StateResponse:
        await self._enter("State", context)
        process = await self._process(request.exec_id, context)
        return pb.StateResponse(
            id=self.id,
            bundle=str(self.bundle),
            pid=process.pid,
            status=STATUS[process.status],
            stdout=process.request.stdout,
            exit_status=process.exit_status or 0,
            exited_at=_time(process.exited_at_ns),
        )

    async def Pids(self, request: Any, context: Any) -> pb.PidsResponse:
        await self._enter("Pids", context)
        return pb.PidsResponse(
            processes=[task_pb2.ProcessInfo(pid=p.pid) for p in self.processes.values() if p.pid]
        )

    async def Pause(self, request: Any, context: Any) -> Empty:
        await self._enter("Pause", context)
        (await self._process("", context)).status = "paused"
        self.emit("/tasks/paused", container_id=self.id)
        return Empty()

    async def Resume(self, request: Any, context: Any) -> Empty:
        await self._enter("Resume", context)
        (await self._process("", context)).status = "running"
        self.emit("/tasks/resumed", container_id=self.id)
        return Empty()

    async def ResizePty(self, request: Any, context: Any) -> Empty:
        await self._enter(f"ResizePty {request.width}x{request.height}", context)
        return Empty()

    async def CloseIO(self, request: Any, context: Any) -> Empty:
        await self._enter("CloseIO", context)
        return Empty()

    async def Update(self, request: Any, context: Any) -> Empty:
        await self._enter(f"Update {request.resources.type_url}", context)
        return Empty()

    async def Checkpoint(self, request: Any, context: Any) -> Empty:
        await self._enter("Checkpoint", context)
        (Path(request.path) / "core.img").write_bytes(b"state")
        return Empty()

    async def Stats(self, request: Any, context: Any) -> pb.StatsResponse:
        await self._enter("Stats", context)
        return pb.StatsResponse(stats=AnyMessage(type_url="figures", value=b"1"))

    async def Connect(self, request: Any, context: Any) -> pb.ConnectResponse:
        await self._enter("Connect", context)
        init = self.processes.get("")
        return pb.ConnectResponse(
            shim_pid=self.pid, task_pid=init.pid if init else 0, version="fake"
        )

    async def Shutdown(self, request: Any, context: Any) -> Empty:
        await self._enter("Shutdown", context)
        if not request.now:
            await self.acknowledged(self.last_seq)
        if self.alive:
            assert self._stand_in is not None
            self._stand_in.kill()
        return Empty()

    async def Metrics(self, request: Any, context: Any) -> control_pb2.MetricsResponse:
        await self._enter("Metrics", context)
        return control_pb2.MetricsResponse(text=self.page)

    async def Attach(
        self, request_iterator: AsyncIterator[streams_pb2.AttachRequest], context: Any
    ) -> AsyncIterator[streams_pb2.AttachResponse]:
        """Echo: what is written as input comes back as output; the end of input ends it."""
        await self._enter("Attach", context)
        context.add_done_callback(lambda _: self.detached.set())
        offset = 0
        async for request in request_iterator:
            self.attached.append(request)
            kind = request.WhichOneof("message")
            if kind == "start":
                await self._enter("AttachStart", context)
                yield streams_pb2.AttachResponse(started=streams_pb2.Started())
            elif kind == "input":
                yield streams_pb2.AttachResponse(
                    output=streams_pb2.Output(offset=offset, data=request.input.data)
                )
                offset += len(request.input.data)
            elif kind == "close_input":
                break
        yield streams_pb2.AttachResponse(finished=streams_pb2.Finished(offset=offset))


def _time(nanoseconds: int) -> Timestamp | None:
    if not nanoseconds:
        return None
    message = Timestamp()
    message.FromNanoseconds(nanoseconds)
    return message
