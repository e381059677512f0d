"""A few warm worker processes, and the jobs they get."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

import services
from services.common import errors
from services.common.background import Background
from services.common.errors import Internal, TheseusError
from services.common.frozen import frozen
from services.containerd.diff.applier import LowerNeeded
from services.containerd.uninterrupted import uninterrupted

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType
    from typing import Self


log = structlog.get_logger(__name__)

_WORKER = "services.containerd.diff.worker"
_END_S = 5.0
_IDLE_S = 30.0


@frozen
class JobResult:
    """An uncompressed tar: its digest and size."""

    digest: str
    size_bytes: int


class WorkerPool:
    """Runs jobs of :mod:`.worker`, as many at once as there are workers; the others wait.

    Workers start when they are needed, and stay until they had no work for a while. One whose job
    is cancelled, or that dies, is replaced. Use as an async context manager: none is left behind.

    Args:
        size: how many at most.
        program: what they run, if not this version of ours.
        idle_s: time without work after which one ends; each has 20 MiB.
    """

    def __init__(
        self, size: int = 2, *, program: Sequence[str] = (), idle_s: float = _IDLE_S
    ) -> None:
        self._free = asyncio.Semaphore(size)
        # With the timers that end them; the one that worked last is the first to work again.
        self._idle: dict[asyncio.subprocess.Process, asyncio.TimerHandle] = {}
        self._idle_s = idle_s
        self._background = Background()
        self._all: set[asyncio.subprocess.Process] = set()
        self._program = tuple(program) or (sys.executable, "-P", "-m", _WORKER)

    @property
    def pids(self) -> set[int]:
        """The workers that there are."""
        return {process.pid for process in self._all}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._background.stop()
        for process in list(self._all):
            await uninterrupted(self._end(process))

    async def run(self, job: str, **arguments: object) -> JobResult:
        """Have a worker do a job; arguments are paths, mounts, and what JSON has.

        Raises:
            TheseusError: as the job says.
            Internal: the worker died.
        """
        line = json.dumps({"job": job, **arguments}, default=_plain).encode() + b"\n"
        async with self._free:
            process = self._take() or await self._start()
            try:
                answer = await self._ask(process, line)
            except BaseException:
                await uninterrupted(self._end(process))
                raise
            self._lay_by(process)
        return _result(answer)

    def _take(self) -> asyncio.subprocess.Process | None:
        if not self._idle:
            return None
        process, timer = self._idle.popitem()
        timer.cancel()
        return process

    def _lay_by(self, process: asyncio.subprocess.Process) -> None:
        def let_go() -> None:
            del self._idle[process]
            log.debug("idle worker ends", pid=process.pid)
            name = f"end of worker {process.pid}"
            self._background.start(uninterrupted(self._end(process)), name=name)

        self._idle[process] = asyncio.get_running_loop().call_later(self._idle_s, let_go)

    async def _start(self) -> asyncio.subprocess.Process:
        # The worker runs the code that this process runs, wherever either was started.
        path = str(Path(services.__file__).parents[1])
        process = await asyncio.create_subprocess_exec(
            *self._program,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
        )
        self._all.add(process)
        return process

    async def _ask(self, process: asyncio.subprocess.Process, line: bytes) -> Mapping[str, Any]:
        assert process.stdin is not None and process.stdout is not None, "both are pipes"
        answer = b""
        try:
            process.stdin.write(line)
            await process.stdin.drain()
            answer = await process.stdout.readline()
        except (BrokenPipeError, ConnectionResetError):
            pass  # told by what is missing
        if not answer.endswith(b"\n"):
            async with asyncio.timeout(_END_S):
                status = await process.wait()
            raise Internal(
                f"the worker that handles layers died ({_cause(status)}): try again, and look for "
                "its last words in the log"
            )
        parsed: dict[str, Any] = json.loads(answer)
        return parsed

    async def _end(self, process: asyncio.subprocess.Process) -> None:
        self._all.discard(process)
        if (timer := self._idle.pop(process, None)) is not None:
            timer.cancel()
        if process.returncode is None:
            process.kill()
        if process.stdin is not None:
            process.stdin.close()
        try:
            async with asyncio.timeout(_END_S):
                await process.wait()
        except TimeoutError:
            log.warning("worker does not end", pid=process.pid)


def _plain(value: object) -> object:
    if isinstance(value, Path):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    raise TypeError(f"{type(value).__name__} has no place in a job")


def _cause(status: int) -> str:
    return f"signal {-status}" if status < 0 else f"exit code {status}"


def _result(answer: Mapping[str, Any]) -> JobResult:
    if "error" in answer:
        is_ours = answer["error"] == LowerNeeded.__name__
        kind = LowerNeeded if is_ours else getattr(errors, answer["error"], Internal)
        if not (isinstance(kind, type) and issubclass(kind, TheseusError)):
            kind = Internal
        raise kind(answer["message"])
    return JobResult(answer["digest"], int(answer["size_bytes"]))
