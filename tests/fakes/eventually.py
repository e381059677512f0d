"""Waiting for what nobody can tell about: a look every few milliseconds, with a limit."""

from __future__ import annotations

import asyncio
import inspect

LIMIT_S = 10


async def eventually(condition, *, limit_s=LIMIT_S):
    """Wait until ``condition()``, plain or a coroutine, holds; returns what it gave."""
    async with asyncio.timeout(limit_s):
        while True:
            value = condition()
            if inspect.isawaitable(value):
                value = await value
            if value:
                return value
            await asyncio.sleep(0.003)
