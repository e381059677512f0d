"""Runs the programs that configure the kernel's network: argument lists, no shell, a time limit.

``ip`` and ``nft`` take their work from standard input, many steps in one process. A program that
has been started is waited for even when the caller is cancelled: what comes after, the undoing
too, never runs at the same time as the step before it.
"""

from __future__ import annotations

import asyncio
import subprocess
from typing import TYPE_CHECKING, TypeVar

from services.common.errors import Internal

if TYPE_CHECKING:
    from collections.abc import Sequence

T = TypeVar("T")

_TIMEOUT_S = 30


async def run(argv: Sequence[str], *, text: str = "") -> str:
    """Run a program with ``text`` on its standard input; returns its standard output.

    Raises:
        Internal: it failed; the message has the end of what it said.
    """
    return await to_end(asyncio.get_running_loop().run_in_executor(None, _run, argv, text))


async def to_end(work: asyncio.Future[T]) -> T:
    """The result of ``work`` in a thread, which is waited for even when the caller is cancelled."""
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        await asyncio.wait({work})
        if not work.cancelled():
            work.exception()
        raise


def _run(argv: Sequence[str], text: str) -> str:
    try:
        done = subprocess.run(
            argv, input=text, capture_output=True, timeout=_TIMEOUT_S, check=False, text=True
        )
    except subprocess.TimeoutExpired as error:
        raise Internal(f"{argv[0]} did not end within {_TIMEOUT_S} s") from error
    except OSError as error:
        raise Internal(f"cannot run {argv[0]}: {error.strerror}") from error
    if done.returncode:
        said = " ".join(done.stderr.split())[-500:]
        raise Internal(f"{argv[0]} failed with status {done.returncode}: {said}")
    return done.stdout
