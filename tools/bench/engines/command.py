"""Running a command to its end."""

from __future__ import annotations

import asyncio
import subprocess
from typing import TYPE_CHECKING

from tools.bench.engines.engine import CALL_S, BenchError

if TYPE_CHECKING:
    from collections.abc import Sequence

MINIMAL = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"}
"""Environment of peers: nothing of a user's configuration."""


async def output(*command: str) -> str:
    """What a command printed.

    Raises:
        BenchError: it failed; the message has what it said.
    """
    done = await finished(command)
    if done.returncode:
        raise BenchError(f"{' '.join(command)}: exit code {done.returncode}: {done.stderr[-500:]}")
    return done.stdout


async def finished(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """A command that ran to its end, whichever that was."""
    return await asyncio.to_thread(
        subprocess.run,
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=CALL_S,
        env=MINIMAL,
    )
