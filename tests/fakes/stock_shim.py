"""Plays a stock containerd for our shim's program: starts it, calls it, takes its events."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from google.protobuf import any_pb2, empty_pb2

from protos.containerd.events import task_pb2
from protos.containerd.services.ttrpc.events.v1 import events_pb2
from protos.containerd.task.v3 import shim_pb2
from protos.containerd.types.runc.options import oci_pb2
from services.common.ttrpc.client import TtrpcClient
from services.common.ttrpc.server import Method, TtrpcServer, methods
from services.shim.ttrpc.events import SERVICE
from tests.fakes.shim_harness import kill_tree

if TYPE_CHECKING:
    from services.common.errors import TheseusError

REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAM = (sys.executable, "-m", "services.shim.ttrpc")
CALL_LIMIT_S = 20


def processes_of(address: Path) -> list[int]:
    """Pids of all that was started for the containerd at ``address``."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdigit() and str(address).encode() in (
                (entry / "cmdline").read_bytes().split(b"\0")
            ):
                found.append(int(entry.name))
    return found


def kill_processes_of(address: Path) -> None:
    """SIGKILL them and their containers, and wait until they are gone."""
    kill_tree(processes_of(address), limit_s=10)


def kill(pid: int) -> None:
    """SIGKILL a process and wait for its end."""
    descriptor = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        wait(descriptor)
    finally:
        os.close(descriptor)


def wait(pidfd: int, limit_s: float = 10) -> None:
    """Wait for the end of a process that need not be ours."""
    import select

    assert select.select([pidfd], [], [], limit_s)[0], "the process does not end"


def parent_of(pid: int) -> int:
    """Pid of a process' parent."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


class Events:
    """containerd's event service: keeps what it is sent.

    ``refusals`` are errors for the next calls, in their order.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.refusals: list[TheseusError] = []
        self.envelopes: asyncio.Queue[object] = asyncio.Queue()
        self._server: TtrpcServer | None = None

    async def start(self) -> None:
        """Serve."""
        self.path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(self.path))
        listener.listen()
        table = {"Forward": Method(events_pb2.ForwardRequest, self._forward)}
        self._server = TtrpcServer(methods({SERVICE: table}))
        await self._server.start(listener)

    async def stop(self) -> None:
        """Be gone, connections too; the socket stays, as after a SIGKILL."""
        if self._server is not None:
            await self._server.stop()
            self._server = None

    async def next(self):
        """The next event: topic and message, and the namespace that it came with."""
        async with asyncio.timeout(10):
            envelope = await self.envelopes.get()
        kind = getattr(task_pb2, envelope.event.type_url.rpartition(".")[2])
        assert envelope.event.type_url == f"containerd.events.{kind.__name__}"
        assert envelope.HasField("timestamp")
        return envelope.topic, kind.FromString(envelope.event.value)

    async def topics(self, count):
        """Topics of the next events."""
        return [(await self.next())[0] for _ in range(count)]

    async def _forward(self, request):
        if self.refusals:
            raise self.refusals.pop(0)
        await self.envelopes.put(request.envelope)
        return empty_pb2.Empty()


class StockContainerd:
    """What containerd does with a shim's program, in a directory with a short path."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.address = directory / "c.sock"
        self.events = Events(directory / "c.sock.ttrpc")

    def bundle(self, spec: dict, name: str) -> Path:
        """A bundle."""
        path = self.directory / "tasks" / name
        path.mkdir(parents=True)
        (path / "config.json").write_text(json.dumps(spec))
        return path

    def run(self, action: str, bundle: Path, *flags: str, given: bytes = b"", **environment: str):
        """Run the program as containerd does; returns what it printed, and nothing else was."""
        arguments = ["-namespace", "ns", "-address", str(self.address)]
        arguments += ["-publish-binary", "/usr/bin/containerd", "-id", bundle.name, *flags, action]
        done = subprocess.run(
            [*PROGRAM, *arguments],
            cwd=bundle,
            input=given,
            capture_output=True,
            timeout=30,
            check=False,
            env={
                **os.environ,
                "PYTHONPATH": str(REPOSITORY),
                "TTRPC_ADDRESS": str(self.events.path),
                **environment,
            },
        )
        assert (done.returncode, done.stderr) == (0, b""), done
        return done.stdout

    async def start(self, bundle: Path) -> StockShim:
        """Start a shim, or find the group's, and connect to it."""
        address = (await asyncio.to_thread(self.run, "start", bundle)).decode()
        assert (bundle / "address").read_text() == address
        return await StockShim.connect(address, bundle)

    async def close(self) -> None:
        """Kill what is left."""
        await self.events.stop()
        await asyncio.to_thread(kill_processes_of, self.address)


class StockShim:
    """A connection to a shim, for one container."""

    def __init__(self, client: TtrpcClient, address: str, bundle: Path) -> None:
        self.client = client
        self.address = address
        self.bundle = bundle
        self.id = bundle.name

    @classmethod
    async def connect(cls, address: str, bundle: Path) -> StockShim:
        """Connect to the shim at ``address``."""
        client = await TtrpcClient.connect(Path(address.removeprefix("unix://")))
        return cls(client, address, bundle)

    async def call(self, method: str, *, version: str = "v2", **fields):
        """A call of the task API for this container."""
        descriptor = shim_pb2.DESCRIPTOR.services_by_name["Task"].methods_by_name[method]
        request = getattr(shim_pb2, descriptor.input_type.name)(id=self.id, **fields)
        payload = await self.client.call(
            f"containerd.task.{version}.Task",
            method,
            request.SerializeToString(),
            timeout_s=CALL_LIMIT_S,
        )
        if descriptor.output_type.name == "Empty":
            return None
        return getattr(shim_pb2, descriptor.output_type.name).FromString(payload)

    async def create(self, runtime: Path, **fields):
        """Create the container with an OCI runtime."""
        value = oci_pb2.Options(
            binary_name=str(runtime), root=str(self.bundle.parent.parent / "runtime")
        ).SerializeToString()
        options = any_pb2.Any(type_url="containerd.runc.v1.Options", value=value)
        return await self.call("Create", bundle=str(self.bundle), options=options, **fields)

    async def pid(self) -> int:
        """The shim's own pid."""
        return (await self.call("Connect")).shim_pid

    async def __aenter__(self):
        return self

    async def __aexit__(self, *details):
        await self.client.__aexit__(*details)
