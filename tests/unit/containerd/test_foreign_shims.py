"""Shims that others wrote: their names, their programs, and the way to them."""

from __future__ import annotations

import asyncio
import socket
import stat
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.empty_pb2 import Empty
from google.protobuf.timestamp_pb2 import Timestamp

from protos.containerd.events import task_pb2
from protos.containerd.runtime.bootstrap.v1 import bootstrap_pb2
from protos.containerd.services.ttrpc.events.v1 import events_pb2
from protos.containerd.task.v3 import shim_pb2, shim_pb2_grpc
from protos.containerd.types import event_pb2
from services.common.errors import (
    DeadlineExceeded,
    InvalidArgument,
    NotFound,
    Unavailable,
    Unimplemented,
)
from services.common.metrics import ServerMetrics
from services.common.ttrpc.client import CallFailed, TtrpcClient
from services.common.ttrpc.server import Method, TtrpcServer, methods
from services.containerd.clients.foreign_shim import ForeignShim, connect_shim
from services.containerd.clients.shim import ShimClient
from services.containerd.clients.shim_program import ShimPrograms, address_of
from services.containerd.events.exchange import Exchange
from services.containerd.rpc.events import event_field
from services.containerd.rpc.shim_events import SERVICE, ShimEvents
from services.containerd.rpc.shim_socket import ShimSocket
from services.containerd.tasks.bundle import Bundle
from services.containerd.tasks.foreign import ForeignRuntimes, program_name, socket_of
from services.containerd.tasks.line import ShimStartFailed
from services.containerd.typed import TypedValue
from tests.fakes.metadata import open_metadata

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from services.containerd.tasks.journal import ShimEvent

OPTIONS = TypedValue("containerd.runc.v1.Options", b"\x0a\x01x")


@pytest.mark.parametrize(
    ("runtime", "program"),
    [
        ("io.containerd.runc.v2", "containerd-shim-runc-v2"),
        ("io.containerd.runsc.v1", "containerd-shim-runsc-v1"),
        ("kata.v2", "containerd-shim-kata-v2"),
    ],
)
def test_a_name_leads_to_a_program(runtime: str, program: str) -> None:
    assert program_name(runtime) == program


@pytest.mark.parametrize("runtime", ["runc", ".runc.v2", "io..v2", "io.runc.", "a/b.runc.v2"])
def test_what_is_no_name_is_refused(runtime: str) -> None:
    with pytest.raises(InvalidArgument, match="neither a name"):
        program_name(runtime)


def test_a_program_is_found_by_path_by_configuration_and_in_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = script(tmp_path / "containerd-shim-x-v1", "exit 0")
    monkeypatch.setenv("PATH", str(tmp_path))
    programs = ShimPrograms(address=tmp_path / "c", publisher="p", log_level="info")
    runtimes = ForeignRuntimes(programs, connect_shim, {"mine": program})
    for name in ("mine", str(program), "io.containerd.x.v1"):
        assert runtimes.launcher(name).binary == str(program)
    for name in ("io.containerd.y.v1", str(tmp_path / "none"), str(tmp_path)):
        with pytest.raises(NotFound, match="runtime"):
            runtimes.launcher(name)


RESULT = bootstrap_pb2.BootstrapResult(version=3, address="/run/s", protocol="grpc")


@pytest.mark.parametrize(
    ("said", "address"),
    [
        (b"unix:///run/s\n", "ttrpc+unix:///run/s?version=2"),
        (
            b'{"version":2,"address":"unix:///run/s","protocol":"ttrpc"}',
            "ttrpc+unix:///run/s?version=2",
        ),
        (b'{"version":3,"address":"/run/s","protocol":"GRPC"}', "grpc+unix:///run/s?version=3"),
        (RESULT.SerializeToString(), "grpc+unix:///run/s?version=3"),
    ],
)
async def test_every_form_of_an_address_is_read(said: bytes, address: str) -> None:
    assert address_of(said, "shim") == address
    assert socket_of(address) == Path("/run/s")
    shim = connect_shim(namespace="n", container_id="c", address=address)
    assert isinstance(shim, ForeignShim)
    await shim.close()


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (b"", "printed no Unix socket"),
        (b"hello", "printed no Unix socket"),
        (b"[]", "printed no Unix socket"),
        (b'{"version":3,"address":"vsock://2:1024","protocol":"ttrpc"}', "no Unix socket"),
        (b'{"version":4,"address":"unix:///run/s","protocol":"ttrpc"}', "version 4 over ttrpc"),
        (b'{"version":2,"address":"unix:///run/s","protocol":"http"}', "version 2 over http"),
    ],
)
def test_what_is_no_address_is_refused(said: bytes, words: str) -> None:
    with pytest.raises(ShimStartFailed, match=words):
        address_of(said, "shim")


async def test_an_address_is_for_one_kind_of_shim() -> None:
    with pytest.raises(InvalidArgument, match="only ttrpc and gRPC"):
        connect_shim(namespace="n", container_id="c", address="ttrpc+vsock://2:1?version=2")
    ours = connect_shim(namespace="n", container_id="c", address="unix:///run/s")
    assert isinstance(ours, ShimClient)
    await ours.close()


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    (tmp_path / "bundle").mkdir()
    return Bundle("ns", "c1", tmp_path / "bundle")


@pytest.fixture
def programs(tmp_path: Path) -> ShimPrograms:
    return ShimPrograms(address=tmp_path / "c.sock", publisher="/pub", log_level="debug")


async def test_a_program_is_told_what_upstream_tells(
    tmp_path: Path, bundle: Bundle, programs: ShimPrograms
) -> None:
    program = script(
        tmp_path / "shim",
        f"cat > {tmp_path}/told; pwd > {tmp_path}/cwd; echo $@ > {tmp_path}/arguments\n"
        f"env > {tmp_path}/environment; echo unix:///run/s",
    )
    address = await programs.start(str(program), bundle, OPTIONS, timeout_s=10)
    assert address == "ttrpc+unix:///run/s?version=2"
    told = AnyMessage.FromString((tmp_path / "told").read_bytes())
    assert (told.type_url, told.value) == (OPTIONS.type_url, OPTIONS.value)
    assert (tmp_path / "cwd").read_text().strip() == str(bundle.path)
    arguments = (tmp_path / "arguments").read_text().split()
    common = ["-namespace", "ns", "-address", f"{tmp_path}/c.sock", "-publish-binary", "/pub"]
    assert arguments == [*common, "-id", "c1", "-debug", "start"]
    environment = (tmp_path / "environment").read_text().splitlines()
    assert f"TTRPC_ADDRESS={tmp_path}/c.sock.ttrpc" in environment
    assert f"GRPC_ADDRESS={tmp_path}/c.sock" in environment
    await programs.delete(str(program), bundle)
    arguments = (tmp_path / "arguments").read_text().split()
    assert arguments == [*common, "-id", "c1", "-bundle", str(bundle.path), "-debug", "delete"]


async def test_a_program_since_2_3_is_told_anew(
    tmp_path: Path, bundle: Bundle, programs: ShimPrograms
) -> None:
    program = script(
        tmp_path / "shim",
        f"cat > {tmp_path}/told; echo >> {tmp_path}/starts\n"
        f"grep -q /pub {tmp_path}/told || {{ echo 'it was started through the deprecated API' >&2; "
        "exit 1; }; echo unix:///run/s",
    )
    for starts in (2, 3):  # the second time it is known
        await programs.start(str(program), bundle, OPTIONS, timeout_s=10)
        assert len((tmp_path / "starts").read_text()) == starts
    params = bootstrap_pb2.BootstrapParams.FromString((tmp_path / "told").read_bytes())
    assert (params.instance_id, params.namespace) == ("c1", "ns")
    assert params.containerd_ttrpc_address == f"{tmp_path}/c.sock.ttrpc"
    assert params.extensions[0].value.type_url == OPTIONS.type_url


async def test_a_program_that_fails_is_told_of_in_its_words(
    tmp_path: Path, bundle: Bundle, programs: ShimPrograms
) -> None:
    program = script(tmp_path / "shim", "echo no such device >&2; exit 3")
    with pytest.raises(ShimStartFailed, match="exit code 3: no such device"):
        await programs.start(str(program), bundle, None, timeout_s=10)
    await programs.delete(str(program), bundle)  # never raises
    await programs.delete(str(tmp_path / "none"), bundle)
    with pytest.raises(ShimStartFailed, match="cannot execute"):
        await programs.start(str(tmp_path / "none"), bundle, None, timeout_s=10)
    slow = script(tmp_path / "slow", "exec sleep 100")
    with pytest.raises(DeadlineExceeded, match=r"did not end within 0\.1 s"):
        await programs.start(str(slow), bundle, None, timeout_s=0.1)


class Task(shim_pb2_grpc.TaskServicer):
    """A shim's task API, over either protocol."""

    def __init__(self) -> None:
        self.killed = asyncio.Event()

    async def Connect(self, request: Any, context: Any = None) -> Any:
        return shim_pb2.ConnectResponse(shim_pid=1, task_pid=2, version="x")

    async def Wait(self, request: Any, context: Any = None) -> Any:
        await self.killed.wait()
        return shim_pb2.WaitResponse(exit_status=9)

    async def Kill(self, request: Any, context: Any = None) -> Any:
        if request.exec_id:
            raise NotFound(f"no process {request.exec_id}")
        self.killed.set()
        return Empty()


@asynccontextmanager
async def ttrpc_shim(path: Path, version: str) -> AsyncIterator[str]:
    task = Task()
    table = {
        "Connect": Method(shim_pb2.ConnectRequest, task.Connect),
        "Wait": Method(shim_pb2.WaitRequest, task.Wait),
        "Kill": Method(shim_pb2.KillRequest, task.Kill),
    }
    server = TtrpcServer(methods({f"containerd.task.v{version}.Task": table}))
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    listener.setblocking(False)
    await server.start(listener)
    yield f"ttrpc+unix://{path}?version={version}"
    await server.stop()


@asynccontextmanager
async def grpc_shim(path: Path, version: str) -> AsyncIterator[str]:
    server = grpc.aio.server()
    shim_pb2_grpc.add_TaskServicer_to_server(Task(), server)  # type: ignore[no-untyped-call]
    server.add_insecure_port(f"unix:{path}")
    await server.start()
    yield f"grpc+unix://{path}?version={version}"
    await server.stop(0)


@pytest.mark.parametrize(
    ("serve", "version"), [(ttrpc_shim, "2"), (ttrpc_shim, "3"), (grpc_shim, "3")]
)
async def test_calls_are_made_over_both_protocols_at_the_same_time(
    tmp_path: Path, serve: Any, version: str
) -> None:
    async with serve(tmp_path / "s", version) as address:
        shim = connect_shim(namespace="n", container_id="c", address=address)
        assert (await shim.connect()).task_pid == 2
        waiting = asyncio.create_task(shim.wait(""))
        await shim.kill("", 9)
        assert (await waiting).exit_status == 9
        with pytest.raises(Unimplemented):
            await shim.pause()
        for refused in (shim.info(), shim.reexec(["x"], 1)):
            with pytest.raises(Unimplemented, match="others wrote"):
                await refused
        assert await shim.metrics() == b""
        await shim.close()
        with pytest.raises(Unavailable):
            await shim.connect()


async def test_a_shim_that_comes_back_is_reached_again(tmp_path: Path) -> None:
    async with ttrpc_shim(tmp_path / "s", "2") as address:
        shim = connect_shim(namespace="n", container_id="c", address=address)
        await shim.connect()
        with pytest.raises(NotFound, match="no process x"):
            await shim.kill("x", 9)
        waiting = asyncio.create_task(shim.wait(""))
        await shim.connect()
    with pytest.raises(Unavailable):
        await waiting
    with pytest.raises(Unavailable):
        await shim.connect()
    async with ttrpc_shim(tmp_path / "s", "2"):
        assert (await shim.connect()).shim_pid == 1
    await shim.close()


class Shims:
    """A register that has one shim that others wrote, of container c1."""

    def __init__(self) -> None:
        self.events: list[ShimEvent] = []

    async def forwarded(self, namespace: str, container_id: str, event: ShimEvent) -> bool:
        if (namespace, container_id) != ("ns", "c1"):
            return False
        self.events.append(event)
        return True


async def test_events_of_shims_come_in_by_ttrpc(tmp_path: Path) -> None:
    def request(container_id: str, seconds: int = 1) -> bytes:
        event = task_pb2.TaskPaused(container_id=container_id)
        envelope = event_pb2.Envelope(
            timestamp=Timestamp(seconds=seconds),
            namespace="ns",
            topic="/tasks/paused",
            event=AnyMessage(
                type_url="containerd.events.TaskPaused", value=event.SerializeToString()
            ),
        )
        return events_pb2.ForwardRequest(envelope=envelope).SerializeToString()

    shims: Any = Shims()
    path = tmp_path / "c.ttrpc"
    async with open_metadata(tmp_path) as meta:
        events = ShimEvents(shims, Exchange(meta.db, meta.journal, event_field))
        metrics = ServerMetrics()

        def serve() -> ShimSocket:
            return ShimSocket(tmp_path / "c", shims=shims, events=events, metrics=metrics)

        async with (
            serve(),
            await TtrpcClient.connect(path) as client,
        ):
            for container_id in ("c1", "c2"):
                await client.call(SERVICE, "Forward", request(container_id), timeout_s=5)
            with pytest.raises(CallFailed, match="needs its timestamp"):
                await client.call(SERVICE, "Forward", request("c1", 0), timeout_s=5)
            async with serve():
                pass  # a successor came and went: the socket is its own to take away
            assert not path.exists()
        assert [event.topic for event in shims.events] == ["/tasks/paused"]
        assert shims.events[0].timestamp_ns == 1_000_000_000
        [(namespace, topic, message)] = await meta.events()
        assert (namespace, topic, getattr(message, "container_id", "")) == (
            "ns",
            "/tasks/paused",
            "c2",
        )
