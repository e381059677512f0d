"""Runs programs that serve gRPC, starts again one that dies, ends them in order.

They have process groups of their own, so that a Ctrl-C reaches only us and we end them in order:
last started first. Should we be killed, the kernel tells them to end, where setpriv(1) is there to
ask it for that. The containers below them go on in any case.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import struct
import sys
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Self

import structlog

from services.common.background import Background
from services.common.errors import FailedPrecondition, TheseusError
from services.common.frozen import frozen

if TYPE_CHECKING:
    from collections.abc import Sequence

log = structlog.get_logger(__name__)

_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 1.0
_STEADY_S = 10.0
"""One that ran for this long starts again at once when it dies."""

_STOP_S = 20.0
_PROBE_TIMEOUT_S = 5.0
_PROBE_PAUSE_S = 0.02


@frozen
class Tier:
    """A program to keep running.

    Attributes:
        name: what it is called in messages.
        command: program and arguments.
        socket: where it serves grpc.health.v1.
        log_file: gets what it writes to standard error; None: ours does.
    """

    name: str
    command: tuple[str, ...]
    socket: Path
    log_file: Path | None = None


def program(name: str) -> tuple[str, ...]:
    """The command of a tier: the installed program beside our interpreter, or the module."""
    installed = Path(sys.executable).with_name(f"theseus-{name}")
    if installed.is_file():
        return (str(installed),)
    return (sys.executable, "-m", f"services.{name}")


def _server(path: Path) -> int:
    """Process id of who listens on a Unix socket; 0 for nobody (unix(7), SO_PEERCRED)."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
            credentials = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        except OSError:
            return 0
    pid, _, _ = struct.unpack("iII", credentials)
    return int(pid)


class Supervisor:
    """Keeps ``tiers`` running inside its block; they start together and end last first."""

    def __init__(self, tiers: Sequence[Tier]) -> None:
        self._keepers = [_Keeper(tier) for tier in tiers]
        self._stop = asyncio.Event()
        self._background = Background()

    async def __aenter__(self) -> Self:
        await self._background.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        for keeper in reversed(self._keepers):
            await keeper.end()
        await self._background.stop()

    @property
    def stopping(self) -> bool:
        """Whether :meth:`stop` was called."""
        return self._stop.is_set()

    def stop(self) -> None:
        """Ask for the end; asked twice, they are killed."""
        if self._stop.is_set():
            for keeper in self._keepers:
                keeper.signal(signal.SIGKILL)
        self._stop.set()

    async def ready(self) -> None:
        """Start all; returns when all serve, or the end was asked for.

        Raises:
            FailedPrecondition: one ended before it ever served.
        """
        stopping = self._background.start(self._stop.wait(), name="stop")
        for keeper in self._keepers:
            self._background.start(keeper.keep(), name=keeper.tier.name)
        for keeper in self._keepers:
            await asyncio.wait([keeper.served, stopping], return_when=asyncio.FIRST_COMPLETED)
            if keeper.served.done():
                keeper.served.result()

    async def stopped(self) -> None:
        """Returns when :meth:`stop` was called."""
        await self._stop.wait()


class _Keeper:
    """Keeps one tier running.

    Attributes:
        served: done when it served for the first time, or failed to.
    """

    def __init__(self, tier: Tier) -> None:
        self.tier = tier
        self.served: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._process: asyncio.subprocess.Process | None = None
        self._ending = asyncio.Event()

    async def keep(self) -> None:
        """Run it again and again, with longer pauses the sooner it dies."""
        loop = asyncio.get_running_loop()
        pause_s = _FIRST_PAUSE_S
        while not self._ending.is_set():
            began = loop.time()
            code = await self._run_once()
            if self._ending.is_set():
                return
            if not self.served.done():
                where = f"see {self.tier.log_file}" if self.tier.log_file else "it said why above"
                failure = f"{self.tier.name} ended with {code} before it served: {where}"
                self.served.set_exception(FailedPrecondition(failure))
                return
            if loop.time() - began >= _STEADY_S:
                pause_s = _FIRST_PAUSE_S
            log.warning("tier ended", name=self.tier.name, exit_code=code, pause_s=pause_s)
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)

    async def end(self) -> None:
        """Tell it to end, and wait until it has."""
        self._ending.set()
        self.signal(signal.SIGTERM)
        if self._process is None:
            return
        try:
            async with asyncio.timeout(_STOP_S):
                await self._process.wait()
        except TimeoutError:
            log.warning("tier does not end, killed", name=self.tier.name)
            self.signal(signal.SIGKILL)
            await self._process.wait()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, if it runs."""
        if self._process is not None and self._process.returncode is None:
            with suppress(ProcessLookupError):
                self._process.send_signal(number)

    async def _run_once(self) -> int:
        self._process = await self._spawn()
        log.info("tier started", name=self.tier.name, child=self._process.pid)
        async with Background() as background:
            background.start(self._probe(), name=f"probe of {self.tier.name}")
            return await self._process.wait()

    async def _spawn(self) -> asyncio.subprocess.Process:
        setpriv = shutil.which("setpriv")
        prefix = (setpriv, "--pdeathsig", "TERM", "--") if setpriv else ()
        # gRPC was made quiet for ourselves only.
        environment = {key: value for key, value in os.environ.items() if key != "GRPC_VERBOSITY"}
        with ExitStack() as stack:
            stderr = None
            if self.tier.log_file is not None:
                self.tier.log_file.parent.mkdir(parents=True, exist_ok=True)
                stderr = stack.enter_context(self.tier.log_file.open("ab"))
            return await asyncio.create_subprocess_exec(
                *prefix,
                *self.tier.command,
                stdin=asyncio.subprocess.DEVNULL,
                stderr=stderr,
                env=environment,
                process_group=0,
            )

    async def _probe(self) -> None:
        """Ask for its health until it serves."""
        from grpc_health.v1 import health_pb2, health_pb2_grpc

        from services.common.client import connect
        from services.common.rpc_errors import translated

        assert self._process is not None
        request = health_pb2.HealthCheckRequest()
        status = health_pb2.HealthCheckResponse.UNKNOWN
        while status != health_pb2.HealthCheckResponse.SERVING:
            # A channel that found nobody would wait longer and longer before it looks again; and
            # another process' socket may lie there, until this one puts its own in its place.
            while _server(self.tier.socket) != self._process.pid:  # noqa: ASYNC110 - no event tells
                await asyncio.sleep(_PROBE_PAUSE_S)
            async with connect(self.tier.socket) as channel:
                with suppress(TheseusError), translated():
                    check = health_pb2_grpc.HealthStub(channel).Check
                    status = (await check(request, timeout=_PROBE_TIMEOUT_S)).status
        log.info("tier serves", name=self.tier.name)
        if not self.served.done():
            self.served.set_result(None)
