"""From the start of a tier to its first answer."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import time
import uuid
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING

from protos.containerd.task.v2 import shim_pb2
from tools.bench.case import Case
from tools.bench.engines import ttrpc
from tools.bench.engines.command import output
from tools.bench.engines.containerd import DebianContainerd, TheseusContainerd
from tools.bench.engines.engine import CALL_S, IDLE, BenchError, Plan
from tools.bench.engines.spec import write_bundle
from tools.bench.figures import Quantity
from tools.bench.rounds import Stopwatch, Trial, interleave

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tools.bench.bench import Bench
    from tools.bench.engines.engine import Engine

CONTAINERD = Quantity("starts", "start of containerd to its first answer")
DAEMON = Quantity("starts", "start of the daemon to its first answer, containerd being there")
SHIM = Quantity("starts", "start of a shim until it answers")
WAITING = Quantity("starts", "start of a shim that has waited until it answers")
_TASK = "containerd.task.v2.Task"
_OUR_TASK = "containerd.task.v3.Task"
_ANSWER_MAX_BYTES = 65536
BOTH = Quantity("starts", "start of daemon and containerd at once to the daemon's first answers")


async def _measure(bench: Bench) -> None:
    trials = [
        Trial(engine.subject, partial(_alone, engine), "containerd")
        for engine in await bench.containerds()
    ]
    for engine in await bench.daemons():
        if engine.servers:
            trials.append(Trial(engine.subject, partial(_together, engine), "all tiers"))
        if len(engine.servers) > 1:
            trials.append(Trial(engine.subject, partial(_last, engine), "the daemon"))
    await interleave(bench, trials, bench.scale.pulls, warm=bench.scale.warm)
    shims: list[Trial] = []
    for engine in await bench.containerds():
        if isinstance(engine, TheseusContainerd):
            await engine.destroy(await engine.create(Plan(command=IDLE)))  # the factory is there
            shims.append(Trial(engine.subject, partial(_our_shim, engine), "the shim"))
        elif isinstance(engine, DebianContainerd):
            shims.append(Trial(engine.subject, partial(_debian_shim, engine), "the shim"))
    await interleave(bench, shims, bench.scale.rounds)


async def _our_shim(engine: TheseusContainerd, watch: Stopwatch) -> None:
    """As its containerd starts one: forked for the request, and one that has waited for it."""
    for quantity, waits in ((SHIM, False), (WAITING, True)):
        with _bundle(engine) as bundle:
            watch.found[quantity] = await asyncio.to_thread(_born, engine, bundle, waits=waits)


def _born(engine: TheseusContainerd, bundle: Path, *, waits: bool) -> float:
    """Ask the factory for a shim; returns the seconds until that has answered a first call."""
    state = engine.servers[0].address.parent
    address = str(bundle.with_suffix(".sock"))
    request = {
        "namespace": "bench",
        "id": bundle.name,
        "bundle": str(bundle),
        "socket": address,
        "registry": str(bundle.with_suffix(".nobody")),  # containerd knows nothing of it
        "instance_id": uuid.uuid4().hex,
    }
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as line:
        line.settimeout(CALL_S)
        line.connect(str(state / "factory.sock"))
        if waits:
            _tell(line, {"wait_in": str(state)})
        began = time.perf_counter()
        _tell(line, request)
        _connect(address, _OUR_TASK, bundle.name)
        seconds = time.perf_counter() - began
        _shut_down(address, _OUR_TASK, bundle.name)
        line.recv(1)  # nothing: it has ended, or it would write into a bundle that is gone
    return seconds


def _tell(line: socket.socket, request: dict[str, str]) -> None:
    line.send(json.dumps(request).encode())
    answer = json.loads(line.recv(_ANSWER_MAX_BYTES) or b'{"error": "it has ended"}')
    if "error" in answer:
        raise BenchError(f"no shim: {answer['error']}")


async def _debian_shim(engine: DebianContainerd, watch: Stopwatch) -> None:
    """As its containerd starts it, to its answer to a first call."""
    with _bundle(engine) as bundle, _log(bundle / "log"):
        began = time.perf_counter()
        said = await output(
            *("env", "-C", str(bundle), "containerd-shim-runc-v2", "-namespace", "bench"),
            *("-address", str(engine.servers[0].address)),
            *("-publish-binary", "/usr/bin/containerd", "-id", bundle.name, "start"),
        )
        address = said.strip().removeprefix("unix://")
        await asyncio.to_thread(_connect, address, _TASK, bundle.name)
        watch.found[SHIM] = time.perf_counter() - began
        await asyncio.to_thread(_shut_down, address, _TASK, bundle.name)


def _connect(address: str, service: str, name: str) -> None:
    ttrpc.call(address, service, "Connect", shim_pb2.ConnectRequest(id=name))


def _shut_down(address: str, service: str, name: str) -> None:
    with suppress(BenchError, ConnectionError):  # it may end before it answers
        ttrpc.call(address, service, "Shutdown", shim_pb2.ShutdownRequest(id=name, now=True))


@contextmanager
def _bundle(engine: Engine) -> Iterator[Path]:
    """A bundle that no containerd knows of."""
    bundle = engine.place / f"bundle-{uuid.uuid4().hex}"
    write_bundle(bundle)
    try:
        yield bundle
    finally:
        shutil.rmtree(bundle)


@contextmanager
def _log(path: Path) -> Iterator[None]:
    """The FIFO that containerd reads a shim's log from."""
    os.mkfifo(path)
    descriptor = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    try:
        yield
    finally:
        os.close(descriptor)


async def _alone(engine: Engine, watch: Stopwatch) -> None:
    await engine.close()
    watch.found[CONTAINERD] = await engine.servers[0].start()


async def _last(engine: Engine, watch: Stopwatch) -> None:
    await engine.forget()
    await engine.servers[-1].stop()
    watch.found[DAEMON] = await engine.servers[-1].start()


async def _together(engine: Engine, watch: Stopwatch) -> None:
    await engine.close()
    with watch(BOTH):
        for server in engine.servers:
            server.spawn()
        for server in engine.servers:
            await server.answering()
        await engine.count()


STARTS = Case(
    "starts",
    "Start of each tier",
    "From the start of the program, on a root that was in use before and holds no container, to "
    "the answer to a first call over a new connection. dockerd starts its own containerd. A shim "
    "is started as its containerd does, without a container: Theseus' by its factory, which runs "
    "already, containerd's is a program. Theseus has two shims wait, unless told otherwise.",
    _measure,
)
