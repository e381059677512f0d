"""A long-lived program of an engine: start, first answer, end, sudden death."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import time
from typing import TYPE_CHECKING

import aiohttp
import grpc

from tools.bench.engines.engine import BenchError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence
    from pathlib import Path

_START_S = 60.0
_STOP_S = 30.0
_PAUSE_S = 0.001


class Server:
    """One program.

    Args:
        name: the tier that it is.
        command: program and arguments.
        address: its Unix socket.
        answers: asks it something over a new connection, and raises as long as it does not answer.
        log: gets all that it says.
        environment: its environment; ours, if None.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        address: Path,
        answers: Callable[[Path], Awaitable[object]],
        log: Path,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.address = address
        self._command = list(command)
        self._answers = answers
        self._log = log
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Its process id."""
        if self._process is None:
            raise BenchError(f"{self.name} does not run")
        return self._process.pid

    async def start(self) -> float:
        """Start it; returns the seconds until it gave its first answer."""
        began = time.perf_counter()
        self.spawn()
        await self.answering()
        return time.perf_counter() - began

    def spawn(self) -> None:
        """Start it, without waiting for anything."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment,
                process_group=0,  # a Ctrl-C is ours to handle
            )

    async def answering(self) -> None:
        """Returns when it answers.

        Raises:
            BenchError: it ended, or time is up.
        """
        assert self._process is not None
        give_up_at = time.monotonic() + _START_S
        while True:
            try:
                _connect(self.address)
                await self._answers(self.address)
                return
            except (OSError, grpc.RpcError, aiohttp.ClientError) as error:
                if self._process.poll() is not None:
                    raise BenchError(self._obituary()) from error
                if time.monotonic() > give_up_at:
                    raise BenchError(f"{self.name} does not answer: {self._tail()}") from error
            await asyncio.sleep(_PAUSE_S)

    def kill(self) -> None:
        """SIGKILL; returns when it has ended."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(_STOP_S)

    async def stop(self) -> None:
        """SIGTERM, and SIGKILL to who does not listen; returns when it has ended."""
        if self._process is None or self._process.poll() is not None:
            return
        self._process.terminate()
        try:
            await asyncio.to_thread(self._process.wait, _STOP_S)
        except subprocess.TimeoutExpired:
            self.kill()

    def _obituary(self) -> str:
        assert self._process is not None
        return f"{self.name} ended with {self._process.returncode}: {self._tail()}"

    def _tail(self) -> str:
        return self._log.read_text(errors="replace")[-500:]


def _connect(address: Path) -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(address))
