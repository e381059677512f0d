"""Starts a real factory and real shims for tests, and speaks to them."""

from __future__ import annotations

import asyncio
import json
import os
import re
import secrets
import select
import signal
import socket
import subprocess
import sys
import time
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import grpc
from google.protobuf import any_pb2, message_factory

from protos.containerd.task.v3 import shim_pb2, shim_pb2_grpc
from protos.containerd.types.runc.options import oci_pb2
from protos.theseus.shim.v1 import (
    control_pb2,
    control_pb2_grpc,
    streams_pb2,
    streams_pb2_grpc,
)
from services.common.client import connect
from services.common.errors import Unavailable
from services.common.peer import Peer
from services.common.rpc_errors import translated
from tests.fakes.eventually import eventually

REPOSITORY = Path(__file__).resolve().parents[2]
CALL_LIMIT_S = 20
_TASK = shim_pb2.DESCRIPTOR.services_by_name["Task"]


class FactoryProcess:
    """A running ``theseus-shim factory``."""

    def __init__(self, directory: Path, *, prefix: tuple[str, ...] = (), wait: bool = True) -> None:
        self.socket = directory / "factory.sock"
        program = [sys.executable, "-m", "services.shim", "factory", "--socket", str(self.socket)]
        with (directory / "factory.log").open("wb") as log:
            self.process = subprocess.Popen(
                [*prefix, *program], stdin=subprocess.PIPE, stderr=log, cwd=REPOSITORY
            )
        deadline = time.monotonic() + 20
        while wait and not self.socket.exists():
            assert self.process.poll() is None, (directory / "factory.log").read_text()
            assert time.monotonic() < deadline, "the factory does not serve"
            time.sleep(0.01)

    def ask(self, request, *, limit_s: float = 20) -> dict:
        """One request, JSON or raw bytes; empty when it was answered by a hang-up."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.settimeout(limit_s)
            connection.connect(str(self.socket))
            data = request if isinstance(request, bytes) else json.dumps(request).encode()
            connection.send(data)
            answer = connection.recv(65536)
            return json.loads(answer) if answer else {}

    def stop(self) -> int:
        """Close its standard input; returns its exit code."""
        self.process.stdin.close()
        return self.process.wait(10)


class KeeperProcess:
    """A running ``theseus-shim keeper``, with a connection that keeps it up."""

    def __init__(self, directory: Path) -> None:
        self.socket = directory / "keeper.sock"
        self._program = [sys.executable, "-m", "services.shim", "keeper"]
        self._connection = None
        self.start()

    def start(self) -> None:
        """Start it; returns once it serves."""
        subprocess.run(
            [*self._program, "--socket", str(self.socket)], check=True, cwd=REPOSITORY, timeout=30
        )
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._connection.connect(str(self.socket))

    @property
    def pid(self) -> int:
        """Its process id."""
        credentials = self._connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        return int.from_bytes(credentials[:4], sys.byteorder)

    def kill(self) -> None:
        """SIGKILL it, and see it end."""
        pidfd = os.pidfd_open(self.pid)
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        assert self._connection.recv(1) == b""
        self._connection.close()
        os.close(pidfd)

    def leave(self) -> None:
        """Let go of it: it ends by itself once it is of no use."""
        self._connection.close()

    def held(self) -> int:
        """How many descriptors it holds for shims."""
        found = []
        for entry in Path(f"/proc/{self.pid}/fd").iterdir():
            with suppress(FileNotFoundError):
                found.append(str(entry.readlink()))
        theirs = ("pipe:", "/memfd:", "/dev/ptmx", "/dev/pts/", "anon_inode:[pidfd]")
        return sum(name.startswith(theirs) for name in found)


class RunningShim:
    """A shim that the factory started: its task API over ttrpc, and stubs over gRPC."""

    def __init__(self, answer: dict, request: dict) -> None:
        self.pid = answer["pid"]
        self.request = request
        self.bundle = Path(request["bundle"])
        self.id = request["id"]
        self.pidfd = os.pidfd_open(self.pid)
        self._inits: list[int] = []  # pidfds: who adopts a container is not its parent
        self.peer = Peer(request["socket"], namespace=request["namespace"])
        self.channel = connect(request["socket"], namespace=request["namespace"])
        self.task = shim_pb2_grpc.TaskStub(self.channel)
        self.streams = streams_pb2_grpc.StreamsStub(self.channel)
        self.control = control_pb2_grpc.ControlStub(self.channel)

    async def call(self, name: str, request):
        """A call of the task API, as containerd makes it; raises our errors."""
        method = _TASK.methods_by_name[name]
        answer = await self.peer.call(
            f"{_TASK.full_name}/{name}", request.SerializeToString(), timeout_s=CALL_LIMIT_S
        )
        return message_factory.GetMessageClass(method.output_type).FromString(answer)

    async def create(self, *, binary="", rootfs=(), options=None, **streams):
        """Create the container."""
        packed = options
        if packed is None:
            value = oci_pb2.Options(binary_name=str(binary)).SerializeToString()
            packed = any_pb2.Any(type_url="containerd.runc.v1.Options", value=value)
        request = shim_pb2.CreateTaskRequest(
            id=self.id, bundle=str(self.bundle), rootfs=rootfs, options=packed, **streams
        )
        created = await self.call("Create", request)
        self._note_init(created.pid)
        return created

    async def start(self, exec_id=""):
        """Start a process."""
        started = await self.call("Start", shim_pb2.StartRequest(id=self.id, exec_id=exec_id))
        if not exec_id and not self._inits:  # it was restored
            self._note_init(started.pid)
        return started

    def _note_init(self, pid):
        with suppress(ProcessLookupError):
            if pid:
                self._inits.append(os.pidfd_open(pid))

    def exec_request(self, exec_id, arguments, *, cwd="/", **streams):
        """A request that adds an exec process."""
        spec = {
            "args": arguments,
            "cwd": cwd,
            "env": ["PATH=/bin:/usr/bin"],
            "user": {"uid": 0, "gid": 0},
            "terminal": streams.get("terminal", False),
        }
        value = json.dumps(spec).encode()
        return shim_pb2.ExecProcessRequest(
            id=self.id, exec_id=exec_id, spec=any_pb2.Any(value=value), **streams
        )

    def run(self, exec_id, arguments, **more):
        """An attach call that starts an exec process, and tells how it ended."""
        request = self.exec_request(exec_id, arguments, **{"stdout": "theseus-stream:", **more})
        process = streams_pb2.NewProcess(
            spec=request.spec.value,
            stdin=request.stdin,
            stdout=request.stdout,
            stderr=request.stderr,
            terminal=request.terminal,
        )
        return self.attach(
            exec_id=exec_id, output=True, input=bool(more.get("stdin")), exit=True, process=process
        )

    async def exec(self, exec_id, arguments, **more):
        """Add and start an exec process."""
        await self.call("Exec", self.exec_request(exec_id, arguments, **more))
        return await self.start(exec_id)

    async def state(self, exec_id=""):
        """State of a process."""
        return await self.call("State", shim_pb2.StateRequest(id=self.id, exec_id=exec_id))

    async def wait(self, exec_id=""):
        """Wait for a process."""
        return await self.call("Wait", shim_pb2.WaitRequest(id=self.id, exec_id=exec_id))

    async def kill(self, signum=signal.SIGKILL, exec_id="", **more):
        """Signal a process."""
        await self.call(
            "Kill", shim_pb2.KillRequest(id=self.id, exec_id=exec_id, signal=signum, **more)
        )

    async def delete(self, exec_id=""):
        """Delete a process."""
        return await self.call("Delete", shim_pb2.DeleteRequest(id=self.id, exec_id=exec_id))

    async def shutdown(self, *, now=False):
        """Ask the shim to end."""
        await self.call("Shutdown", shim_pb2.ShutdownRequest(id=self.id, now=now))

    def attach(self, *, exec_id="", **start):
        """An attach call whose start is sent."""
        return Attachment(self, exec_id, start)

    async def output(self, *, exec_id="", offset=0, **start):
        """Everything that a process writes, to its end, by stream."""
        streams = {1: b"", 2: b""}
        async with self.attach(exec_id=exec_id, output=True, offset=offset, **start) as attached:
            async for response in attached:
                if response.HasField("output"):
                    streams[response.output.stream] += response.output.data
        return streams[1], streams[2]

    async def metrics(self) -> str:
        """The metrics page."""
        page = await self.control.Metrics(control_pb2.MetricsRequest(), timeout=CALL_LIMIT_S)
        return page.text.decode()

    async def info(self):
        """Who it is."""
        return await self.control.Info(control_pb2.InfoRequest(), timeout=CALL_LIMIT_S)

    async def reexec(self, *program: str, limit_s: float = 60):
        """Have it execute ``program`` in place, asking again while the connection is broken."""
        generation = (await self.patient(self.control.Info, control_pb2.InfoRequest())).generation
        request = control_pb2.ReexecRequest(program=program, generation=generation + 1)
        return await self.patient(self.control.Reexec, request, limit_s=limit_s)

    async def patient(self, method, request, *, limit_s: float = 60):
        """A call that is made again for as long as it ends with UNAVAILABLE."""
        deadline = time.monotonic() + limit_s
        while True:
            try:
                with translated():
                    return await method(request, timeout=limit_s)
            except Unavailable:
                if time.monotonic() > deadline:
                    raise

    async def ended(self, limit_s: float = 10) -> None:
        """Wait until the process is gone."""
        loop = asyncio.get_running_loop()
        gone = loop.create_future()
        loop.add_reader(self.pidfd, lambda: gone.done() or gone.set_result(None))
        try:
            async with asyncio.timeout(limit_s):
                await gone
        finally:
            loop.remove_reader(self.pidfd)

    async def die(self) -> None:
        """SIGKILL the shim, and nothing else."""
        signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        await self.ended()

    async def close_client(self) -> None:
        """Let go of one whose container is deleted, and whose process goes on."""
        await self.peer.close()
        await self.channel.close()
        for pidfd in (*self._inits, self.pidfd):
            os.close(pidfd)

    def _is_deleting(self) -> bool:
        try:
            state = json.loads((self.bundle / "state.json").read_text())
        except FileNotFoundError:
            return False
        deleted = any(c["processes"][0]["status"] == "deleted" for c in state["containers"])
        return deleted and pid_of(self.pidfd) > 0

    async def close(self) -> None:
        """Let go of it; it and all below it are killed if they are still there.

        It is left the time to have the runtime delete what it has deleted, as containerd does.
        """
        await eventually(lambda: not self._is_deleting())
        await self.peer.close()
        await self.channel.close()
        inits = [pid for pidfd in self._inits if (pid := pid_of(pidfd))]
        kill_tree(inits, limit_s=10)  # their children too: without a pid namespace they stay
        for pidfd in self._inits:
            os.close(pidfd)
        kill_tree(descendants(self.pid), limit_s=10)
        try:
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        except ProcessLookupError:
            pass
        else:
            await self.ended()
        os.close(self.pidfd)


def pid_of(pidfd: int) -> int:
    """Pid of the process that a pidfd stands for; 0 when it is gone."""
    fields = Path(f"/proc/self/fdinfo/{pidfd}").read_text()
    return max(int(re.search(r"^Pid:\s*(-?\d+)", fields, re.MULTILINE)[1]), 0)


def kill_tree(roots: list[int], *, limit_s: float) -> None:
    """SIGKILL processes and all below them, and see them end.

    They are stopped first: what forks, or loses its parent, while its tree is walked is missed.
    """
    found: dict[int, int] = {}
    waiting = list(roots)
    try:
        while waiting:
            pid = waiting.pop()
            with suppress(ProcessLookupError):
                found[pid] = pidfd = os.pidfd_open(pid)
                signal.pidfd_send_signal(pidfd, signal.SIGSTOP)
                waiting += [child for child in children(pid) if child not in found]
        for pidfd in found.values():
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        for pid, pidfd in found.items():
            assert select.select([pidfd], [], [], limit_s)[0], f"process {pid} does not end"
    finally:
        for pidfd in found.values():
            os.close(pidfd)


def children(pid: int) -> list[int]:
    """Pids of a process' children."""
    found: list[int] = []
    with suppress(FileNotFoundError, ProcessLookupError):  # it may end at any time
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += map(int, (task / "children").read_text().split())
    return found


def descendants(pid: int) -> list[int]:
    """Pids of all below a process."""
    return [below for child in children(pid) for below in (child, *descendants(child))]


class Attachment:
    """One Attach call."""

    def __init__(self, shim: RunningShim, exec_id: str, start: dict) -> None:
        self._call = shim.streams.Attach(timeout=CALL_LIMIT_S)
        self._start = streams_pb2.AttachStart(container_id=shim.id, exec_id=exec_id, **start)
        self.started = None

    async def __aenter__(self):
        with translated():
            await self._call.write(streams_pb2.AttachRequest(start=self._start))
            self.started = (await self._read()).started
        return self

    async def __aexit__(self, *_):
        self._call.cancel()

    def __aiter__(self):
        return self

    async def __anext__(self):
        with translated():
            response = await self._read()
        if response is grpc.aio.EOF:
            raise StopAsyncIteration
        return response

    async def write(self, offset, data):
        """Send input."""
        request = streams_pb2.AttachRequest(input=streams_pb2.Input(offset=offset, data=data))
        await self._call.write(request)

    async def close_input(self):
        """Send end of input."""
        request = streams_pb2.AttachRequest(close_input=streams_pb2.CloseInput())
        await self._call.write(request)

    async def resize(self, width, height):
        """Send a size."""
        request = streams_pb2.AttachRequest(resize=streams_pb2.Resize(width=width, height=height))
        await self._call.write(request)

    async def forget(self):
        """Have the process deleted."""
        await self._call.write(streams_pb2.AttachRequest(forget=streams_pb2.Forget()))

    async def rest(self):
        """Everything up to the end, and what is said there."""
        data = b""
        async for response in self:
            if response.HasField("finished"):
                return data, response.finished
            data += response.output.data
        raise AssertionError("the end was not told")

    async def read_until(self, text: bytes) -> bytes:
        """Output up to and with ``text``."""
        data = b""
        while text not in data:
            response = await anext(self)
            data += response.output.data
        return data

    async def _read(self):
        response = await self._call.read()
        # A failed call says why only at its end.
        if response is grpc.aio.EOF and await self._call.code() is not grpc.StatusCode.OK:
            raise grpc.aio.AioRpcError(
                await self._call.code(),
                await self._call.initial_metadata(),
                await self._call.trailing_metadata(),
                details=await self._call.details(),
            )
        return response


class ShimMaker:
    """Makes bundles and shims below a directory; closes what it made."""

    def __init__(self, factory: FactoryProcess, directory: Path) -> None:
        self._factory = factory
        self.directory = directory
        self.registry_socket = directory / "state" / "containerd.sock"
        (directory / "state" / "s").mkdir(parents=True)
        self._stack = AsyncExitStack()
        self.bundles = 0

    async def __aenter__(self):
        return self

    async def __aexit__(self, *details):
        await self._stack.aclose()

    def bundle(self, spec: dict, name: str = "") -> Path:
        """A bundle with a spec."""
        self.bundles += 1
        path = self.directory / "tasks" / (name or f"c{self.bundles}")
        path.mkdir(parents=True)
        (path / "config.json").write_text(json.dumps(spec))
        return path

    def request(self, bundle: Path, **more) -> dict:
        """A factory request."""
        return {
            "namespace": "test",
            "id": bundle.name,
            "bundle": str(bundle),
            "socket": str(self.directory / "state" / "s" / secrets.token_hex(8)),
            "registry": str(self.registry_socket),
            "instance_id": secrets.token_hex(16),
            "default_runtime": "runc",
            "request_id": "r1",
            "log_level": "info",
            **more,
        }

    async def start(self, bundle: Path, **more) -> RunningShim:
        """A shim for a bundle."""
        request = self.request(bundle, **more)
        answer = self._factory.ask(request)
        assert "error" not in answer, answer
        shim = RunningShim(answer, request)
        self._stack.push_async_callback(shim.close)
        return shim

    async def adopt(self, dead: RunningShim) -> RunningShim:
        """A successor of a shim that died; raises AssertionError if there can be none."""
        request = {**dead.request, "adopt": True}
        answer = await asyncio.to_thread(self._factory.ask, request)
        assert "error" not in answer, answer
        shim = RunningShim(answer, request)
        self._stack.push_async_callback(shim.close)
        return shim


def plain_spec(*arguments: str, **process) -> dict:
    """A spec for the fake runtime."""
    return {
        "ociVersion": "1.0.2",
        "process": {"args": list(arguments), "env": [], "cwd": "/", **process},
        "linux": {"namespaces": [{"type": "pid"}, {"type": "mount"}]},
    }
