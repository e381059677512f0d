"""The `theseus` command as a process of its own, for tests."""

import asyncio
import os
import sys
from dataclasses import dataclass


@dataclass
class Result:
    code: int
    out: bytes
    err: bytes


class Cli:
    def __init__(self, socket):
        self.environment = {**os.environ, "THESEUS_HOST": f"unix://{socket}", "FROM_HOST": "yes"}

    async def spawn(self, *arguments, **kwargs):
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), asyncio.subprocess.PIPE)
        return await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "services.cli",
            *arguments,
            env=self.environment,
            **(streams | kwargs),
        )

    async def __call__(self, *arguments, stdin=b"", timeout=20):
        process = await self.spawn(*arguments)
        try:
            async with asyncio.timeout(timeout):
                out, err = await process.communicate(stdin)
        except TimeoutError:
            process.kill()
            await process.communicate()
            raise
        return Result(process.returncode, out, err)


async def until(condition, timeout=10):
    """Wait for what another process does; there is no event of ours for it."""
    async with asyncio.timeout(timeout):
        while not condition():  # noqa: ASYNC110 - as the docstring says
            await asyncio.sleep(0.01)
