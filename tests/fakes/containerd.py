"""A whole containerd for tests: in this process, or as a program of its own that can be killed."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
import tempfile
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from services.common.client import connect
from services.containerd.app import App
from services.containerd.config import Config
from services.containerd.gc.policy import GcPolicy
from tools import sandbox

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from types import TracebackType

    import grpc

REPOSITORY = Path(sandbox.__file__).parents[1]
START_S = 20.0
WHEN_ASKED = GcPolicy(startup_delay_s=3600.0)


@asynccontextmanager
async def node_directory() -> AsyncIterator[Path]:
    """A directory with a short path: sockets lie in it."""
    directory = Path(tempfile.mkdtemp(prefix="thc"))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, onerror=_unless_it_is_gone)


def _unless_it_is_gone(
    function: object, path: str, failure: tuple[Any, BaseException, Any]
) -> None:
    """The keeper of descriptors, which ends after containerd, takes its socket away itself."""
    if not isinstance(failure[1], FileNotFoundError):
        raise failure[1]


def config(directory: Path, **changes: object) -> Config:
    """The configuration of a containerd below ``directory``.

    Garbage is collected when a test asks for it: what it has just made and refers to next would be
    garbage to a collection in between.
    """
    return Config(
        root=directory / "root",
        state=directory / "s",
        address=directory / "s" / "c.sock",
        **{"gc": WHEN_ASKED, "merge_memory": False, **changes},  # type: ignore[arg-type]
    )


@asynccontextmanager
async def running_app(directory: Path, **changes: object) -> AsyncIterator[grpc.aio.Channel]:
    """A containerd in this process, and a channel to it in namespace ``test``."""
    chosen = config(directory, **changes)
    async with App(chosen), connect(chosen.address, namespace="test") as channel:
        yield channel


@dataclass
class ContainerdProcess:
    """The program ``theseus-containerd``; ``async with`` starts it and ends it."""

    directory: Path
    options: tuple[str, ...] = ()
    process: asyncio.subprocess.Process | None = None

    @property
    def address(self) -> Path:
        return self.directory / "s" / "c.sock"

    @property
    def log(self) -> str:
        return (self.directory / "log").read_text()

    def arguments(self) -> list[str]:
        return [
            *(sys.executable, "-m", "services.containerd", "--merge-memory=off"),
            *("--root", str(self.directory / "root")),
            *("--state", str(self.directory / "s")),
            *("--address", str(self.address)),
            *self.options,
        ]

    async def start(self) -> None:
        """Run it; returns once it serves."""
        with (self.directory / "log").open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                *self.arguments(),
                cwd=REPOSITORY,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        async with connect(self.address) as channel:
            try:
                await asyncio.wait_for(channel.channel_ready(), START_S)
            except TimeoutError:
                raise AssertionError(f"containerd does not serve:\n{self.log}") from None

    async def kill(self) -> None:
        """Kill it like a crash."""
        assert self.process is not None
        self.process.kill()
        await self.process.wait()

    async def stop(self) -> int:
        """Ask it to stop; returns its exit status."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return await asyncio.wait_for(self.process.wait(), START_S)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.process is not None and self.process.returncode is None:
            await self.kill()


async def run_program(*arguments: str, **environment: str) -> tuple[int, str, str]:
    """Run a program to its end; returns exit status, standard output and standard error."""
    process = await asyncio.create_subprocess_exec(
        *arguments,
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    stdout, stderr = await asyncio.wait_for(process.communicate(), START_S)
    assert process.returncode is not None
    return process.returncode, stdout.decode(), stderr.decode()
