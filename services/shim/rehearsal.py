"""A shim's life, played through in the factory before any shim is forked.

What a process does for the first time costs it memory of its own: code is specialised in place,
types get version tags, caches fill, modules are imported. Done here, it lies in pages that all
shims share. The play has all parts but gRPC, which must not start in a process that forks; its
runtime is a shell script.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

from google.protobuf import any_pb2

from protos.containerd.task.v3 import shim_pb2
from protos.containerd.types.runc.options import oci_pb2
from protos.theseus.shim.v1 import control_pb2, registry_pb2
from services.common import log as logs
from services.shim.app import Shim, Transport
from services.shim.config import ShimConfig
from services.shim.metrics import ShimMetrics
from services.shim.packing import CodeTracer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import CodeType

    from google.protobuf.message import Message

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
    stage = _Stage()
    serving = asyncio.Event()
    with socket.socket(socket.AF_UNIX) as registry:
        registry.bind(str(config.registry))
        registry.listen()
        shim = Shim(config, ShimMetrics(), transport=Transport(stage.server, _Channel))
        async with asyncio.timeout(_LIMIT_S):
            running = asyncio.create_task(shim.run(lambda _identity: serving.set()))
            await serving.wait()
            await _live(stage, bundle, runtime)
            await running


async def _live(stage: _Stage, bundle: Path, runtime: Path) -> None:
    options = oci_pb2.Options(binary_name=str(runtime))
    log = f"theseus-log://{bundle}/log?format=json-file&max-size=1000000&max-file=2"
    created = await stage.call(
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
    )
    await stage.call("Start", shim_pb2.StartRequest(id=_ID))
    await stage.call("State", shim_pb2.StateRequest(id=_ID))
    await stage.call("Pids", shim_pb2.PidsRequest(id=_ID))
    await stage.call("Metrics", control_pb2.MetricsRequest())
    waiting = asyncio.create_task(stage.call("Wait", shim_pb2.WaitRequest(id=_ID)))
    await stage.call("Kill", shim_pb2.KillRequest(id=_ID, signal=signal.SIGKILL))
    ended = await waiting
    if not created.pid or ended.exit_status != 128 + signal.SIGKILL:
        raise RuntimeError("the rehearsal of a shim did not go as it is written")
    await stage.call("Delete", shim_pb2.DeleteRequest(id=_ID))
    await stage.call("Shutdown", shim_pb2.ShutdownRequest(id=_ID, now=True))


class _Stage:
    """Stands for gRPC's server: keeps the handlers, and calls them as it would."""

    def __init__(self) -> None:
        self._interceptors: Sequence[Any] = ()
        self._methods: dict[str, tuple[str, Any]] = {}
        self._socket = socket.socket(socket.AF_UNIX)

    def server(self, *, interceptors: Sequence[Any], options: object) -> _Stage:
        del options
        self._interceptors = interceptors
        return self

    def add_generic_rpc_handlers(self, handlers: Sequence[Any]) -> None:
        (methods,) = handlers
        for method in methods:
            self._methods[method.rpartition("/")[2]] = method, methods

    def add_insecure_port(self, address: str) -> int:
        self._socket.bind(address.removeprefix("unix:"))
        return 1

    async def start(self) -> None:
        """It has no socket to listen on."""

    async def stop(self, grace_s: float) -> None:
        """See :meth:`start`."""
        self._socket.close()

    async def call(self, name: str, request: Message) -> Any:
        """Call the handler of a method the way that gRPC does, messages packed and unpacked."""
        method, methods = self._methods[name]
        details = _Details(method)
        found = await self._handler(0, details, methods.service(details))
        answer = await found.unary_unary(
            found.request_deserializer(request.SerializeToString()), _Context()
        )
        found.response_serializer(answer)
        return answer

    async def _handler(self, number: int, details: _Details, handler: Any) -> Any:
        if number == len(self._interceptors):
            return handler

        async def following(again: _Details) -> Any:
            return await self._handler(number + 1, again, handler)

        return await self._interceptors[number].intercept_service(following, details)


class _Details:
    def __init__(self, method: str) -> None:
        self.method = method
        self.invocation_metadata = ()


class _Context:
    _code: object = None

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return (("theseus-request-id", _ID), ("containerd-namespace", _ID))

    def set_code(self, code: object) -> None:
        self._code = code

    def set_details(self, text: str) -> None:
        raise RuntimeError(f"a call of the rehearsal failed: {self._code}: {text}")


class _Channel:
    """Stands for the channel to a containerd that acknowledges everything."""

    def __init__(self, path: Path) -> None:
        del path

    def stream_stream(self, *_args: object, **_options: object) -> Callable[[], _Register]:
        return _Register

    async def close(self) -> None:
        """There is nothing to close."""


class _Register:
    def __init__(self) -> None:
        self._answers: asyncio.Queue[registry_pb2.RegisterResponse] = asyncio.Queue()

    async def write(self, request: registry_pb2.RegisterRequest) -> None:
        sent = registry_pb2.RegisterRequest.FromString(request.SerializeToString())
        if sent.WhichOneof("message") == "hello":
            welcome = registry_pb2.Welcome(containerd_id=_ID, epoch=1, protocol=1)
            self._answers.put_nowait(registry_pb2.RegisterResponse(welcome=welcome))
        else:
            ack = registry_pb2.Ack(seq=sent.event.seq)
            self._answers.put_nowait(registry_pb2.RegisterResponse(ack=ack))

    async def read(self) -> registry_pb2.RegisterResponse:
        return await self._answers.get()
