"""The runtimes alone: what no engine that uses them can be faster than."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from typing import TYPE_CHECKING

from tools.bench.engines.command import MINIMAL, output
from tools.bench.engines.engine import CALL_S, ECHO, IDLE, SAID, BenchError, Plan
from tools.bench.engines.spec import write_bundle
from tools.bench.figures import Role, Subject

if TYPE_CHECKING:
    from pathlib import Path

    from tools.image import Image


class Bare:
    """Bundles below ``place``, and runc or crun on them."""

    subject = Subject("bare runtime", Role.LIMIT)

    def __init__(self, place: Path, picture: Image) -> None:
        self._rootfs = place / "root" / "rootfs"
        self._rootfs.mkdir()
        layer = place / "layer.tar"
        layer.write_bytes(picture.layers[0])
        subprocess.run(["tar", "-C", str(self._rootfs), "-xf", str(layer)], check=True)
        self._true = self._bundle(place / "root" / "true", Plan())
        self._idle = self._bundle(place / "root" / "idle", Plan(command=IDLE))

    async def run(self, runtime: str) -> None:
        """Create, start, wait for the end, delete."""
        name, init = await self._create(runtime, self._true)
        try:
            await self.begin(runtime, name)
            await _ended(init)
        finally:
            os.close(init)
        await _call(runtime, "delete", name)

    async def create(self, runtime: str) -> tuple[str, int]:
        """Create one that idles; returns its name and a pidfd of its init."""
        return await self._create(runtime, self._idle)

    async def begin(self, runtime: str, name: str) -> None:
        """Start it."""
        await _call(runtime, "start", name)

    async def execute(self, runtime: str, name: str) -> None:
        """Run another command in it."""
        if (said := await output(runtime, "exec", name, *ECHO)).encode() != SAID:
            raise BenchError(f"{runtime} exec said {said!r}")

    async def kill(self, init: int) -> None:
        """Kill it; returns when it has ended. The descriptor is closed."""
        signal.pidfd_send_signal(init, signal.SIGKILL)
        await _ended(init)
        os.close(init)

    async def delete(self, runtime: str, name: str) -> None:
        """Delete one that has ended."""
        await _call(runtime, "delete", name)

    async def _create(self, runtime: str, bundle: Path) -> tuple[str, int]:
        name = f"bench-{time.monotonic_ns()}"
        pid_file = bundle / "pid"
        await _call(runtime, "create", "--bundle", str(bundle), "--pid-file", str(pid_file), name)
        return name, os.pidfd_open(int(pid_file.read_text()))

    def _bundle(self, directory: Path, plan: Plan) -> Path:
        write_bundle(directory, plan, root=str(self._rootfs))
        return directory


async def _ended(init: int) -> None:
    """Wait for the end of a process."""
    loop = asyncio.get_running_loop()
    ended = loop.create_future()
    loop.add_reader(init, ended.set_result, None)
    try:
        async with asyncio.timeout(CALL_S):
            await ended
    finally:
        loop.remove_reader(init)


async def _call(*command: str) -> None:
    # Of its output nothing may be a pipe: the container would hold that open.
    null = subprocess.DEVNULL
    done = await asyncio.to_thread(
        subprocess.run,
        command,
        stdin=null,
        stdout=null,
        stderr=null,
        check=False,
        env=MINIMAL,
        timeout=CALL_S,
    )
    if done.returncode:
        raise BenchError(f"{' '.join(command)}: exit code {done.returncode}")
