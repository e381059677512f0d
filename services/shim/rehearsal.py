"""A shim's life, played through in the factory before any shim is forked.

What a process does for the first time costs it memory of its own: code is specialised in place,
types get version tags, caches fill, modules are imported. Done here, it lies in pages that all
shims share. The play has all parts; its runtime is a shell script, and its containerd acknowledges
everything.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from google.protobuf import any_pb2, empty_pb2

from protos.containerd.task.v3 import shim_pb2
from protos.containerd.types.runc.options import oci_pb2
from protos.theseus.shim.v1 import control_pb2, registry_pb2, registry_pb2_grpc
from services.common import log as logs
from services.common.peer import Peer
from services.common.server import Methods
from services.common.ttrpc.server import TtrpcServer
from services.common.ttrpc_handlers import Handlers
from services.shim.app import Shim
from services.shim.config import ShimConfig
from services.shim.metrics import ShimMetrics
from services.shim.packing import CodeTracer
from services.shim.rpc.server import listen

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from types import CodeType

    from google.protobuf.message import Message

Answer = TypeVar("Answer", bound="Message")

_LIMIT_S = 5.0
_ID = "rehearsal"
_RUNTIME = """#!/bin/sh
while [ $# -gt 0 ]; do
    case $1 in
        create) what=create ;;
        --pid-file) pid_file=$2 ;;
    esac
    shift
done
[ -z "$what" ] || { sleep 60 & echo $! > "$pid_file"; }
"""
_SPEC = '{"ociVersion":"1.0.2","process":{"args":["x"]},"linux":{"namespaces":[{"type":"pid"}]}}'
SIGNALS = (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def rehearse() -> None:
    """Play; blocks for a moment. No thread, no child, no file and no signal handler is left.

    Raises:
        TheseusError: something in it refuses, such as a directory with too long a name.
        TimeoutError: it hangs.
        OSError: there is no shell, or no directory for temporary files.
    """
    least = logs.Logger.least
    handlers = {signum: signal.signal(signum, signal.SIG_DFL) for signum in SIGNALS}
    with (
        _new_directory() as directory,
        Path(os.devnull).open("w") as nowhere,
        contextlib.redirect_stderr(nowhere),
    ):
        runtime = directory / "program"
        runtime.write_text(_RUNTIME)
        runtime.chmod(0o700)
        try:
            bundle = directory / "bundle"
            bundle.mkdir()
            (bundle / "config.json").write_text(_SPEC)
            asyncio.run(_play(bundle, runtime))
        finally:
            logs.Logger.least = least
            for signum, handler in handlers.items():
                signal.signal(signum, handler)


def trace() -> dict[int, CodeType]:
    """The code that a shim runs, by id; it is played twice.

    Raises:
        As :func:`rehearse`.
    """
    rehearse()
    with CodeTracer() as tracer:
        rehearse()
    return tracer.codes


@contextlib.contextmanager
def _new_directory() -> Iterator[Path]:
    # Not by tempfile, which brings random, which seeds itself anew in every forked process.
    directory = Path(os.environ.get("TMPDIR", "/tmp"), f"theseus-{os.urandom(4).hex()}")
    directory.mkdir(mode=0o700)
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


async def _play(bundle: Path, runtime: Path) -> None:
    config = ShimConfig(
        namespace=_ID,
        id=_ID,
        bundle=bundle,
        socket=bundle.with_name("s"),
        registry=bundle.with_name("r"),
        instance_id="0" * 32,
    )
    logs.configure("shim", config.log_level)
    logs.describe(config.log_level)
    serving = asyncio.Event()
    methods: Any = Methods(ShimMetrics().server)
    registry_pb2_grpc.add_RegistryServicer_to_server(_Registry(), methods)
    containerd = TtrpcServer(Handlers(methods).answer)
    await containerd.start(listen(bundle.with_name("r.ttrpc")).socket)
    peer = Peer(config.socket, namespace=_ID)
    try:
        shim = Shim(ShimMetrics())
        async with asyncio.timeout(_LIMIT_S):
            await shim.wait(listen(bundle.with_name("w")), unwanted=lambda: None)
            running = asyncio.create_task(shim.run(config, lambda _identity: serving.set()))
            await serving.wait()
            await _live(_Caller(peer), bundle, runtime)
            await running
    finally:
        await peer.close()
        await containerd.stop()


async def _live(shim: _Caller, bundle: Path, runtime: Path) -> None:
    options = oci_pb2.Options(binary_name=str(runtime))
    log = f"theseus-log://{bundle}/log?format=json-file&max-size=1000000&max-file=2"
    created = await shim.task(
        "Create",
        shim_pb2.CreateTaskRequest(
            id=_ID,
            bundle=str(bundle),
            stdout=log,
            stderr=log,
            stdin="theseus-stream:",
            options=any_pb2.Any(
                type_url=options.DESCRIPTOR.full_name, value=options.SerializeToString()
            ),
        ),
        shim_pb2.CreateTaskResponse,
    )
    await shim.task("Start", shim_pb2.StartRequest(id=_ID), shim_pb2.StartResponse)
    await shim.task("State", shim_pb2.StateRequest(id=_ID), shim_pb2.StateResponse)
    await shim.task("Pids", shim_pb2.PidsRequest(id=_ID), shim_pb2.PidsResponse)
    await shim.control("Metrics", control_pb2.MetricsRequest(), control_pb2.MetricsResponse)
    wait = shim.task("Wait", shim_pb2.WaitRequest(id=_ID), shim_pb2.WaitResponse)
    waiting = asyncio.create_task(wait)
    kill = shim_pb2.KillRequest(id=_ID, signal=signal.SIGKILL)
    await shim.task("Kill", kill, empty_pb2.Empty)
    ended = await waiting
    if not created.pid or ended.exit_status != 128 + signal.SIGKILL:
        raise RuntimeError("the rehearsal of a shim did not go as it is written")
    await shim.task("Delete", shim_pb2.DeleteRequest(id=_ID), shim_pb2.DeleteResponse)
    await shim.task("Shutdown", shim_pb2.ShutdownRequest(id=_ID, now=True), empty_pb2.Empty)


class _Caller:
    """Calls the shim as containerd does."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer

    async def task(self, name: str, request: Message, answer: type[Answer]) -> Answer:
        return await self._call(f"containerd.task.v3.Task/{name}", request, answer)

    async def control(self, name: str, request: Message, answer: type[Answer]) -> Answer:
        return await self._call(f"theseus.shim.v1.Control/{name}", request, answer)

    async def _call(self, method: str, request: Message, answer: type[Answer]) -> Answer:
        data = await self._peer.call(method, request.SerializeToString(), timeout_s=_LIMIT_S)
        return answer.FromString(data)


class _Registry(registry_pb2_grpc.RegistryServicer):
    """Stands for a containerd that acknowledges everything."""

    async def Register(
        self, request_iterator: AsyncIterator[registry_pb2.RegisterRequest], context: object
    ) -> AsyncIterator[registry_pb2.RegisterResponse]:
        async for request in request_iterator:
            if request.WhichOneof("message") == "hello":
                welcome = registry_pb2.Welcome(containerd_id=_ID, epoch=1, protocol=1)
                yield registry_pb2.RegisterResponse(welcome=welcome)
            else:
                ack = registry_pb2.Ack(seq=request.event.seq)
                yield registry_pb2.RegisterResponse(ack=ack)
