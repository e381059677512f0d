"""Owned background tasks: each has a name, ends with its owner, and fails loudly once."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Self

import structlog

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from types import TracebackType

log = structlog.get_logger(__name__)

BEHIND_S = 0.02
"""How long work behind an answer waits.

Who was answered mostly makes its next calls within milliseconds: this work would keep them from
processor and disk. A wait for silence instead would be for ever where eight clients are at work.
"""
_AGAIN_S = 0.5


class Background:
    """An async context manager that owns tasks: on exit they are cancelled and awaited."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()
        self._hurry = asyncio.Event()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.stop()

    def start(self, work: Coroutine[Any, Any, Any], *, name: str) -> asyncio.Task[Any]:
        """Run ``work`` as a task of this owner; its failure is logged with a traceback."""
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def start_behind(
        self, work: Callable[[], Coroutine[Any, Any, Any]], *, name: str
    ) -> asyncio.Task[Any]:
        """As ``start``, for what nobody waits for: it begins after ``BEHIND_S``, or ``hurry``."""
        return self.start(_behind(work, self._hurry), name=name)

    def hurry(self) -> None:
        """Have what waits to begin behind an answer begin now: it is waited for after all."""
        self._hurry.set()
        self._hurry = asyncio.Event()

    async def finish(self, limit_s: float) -> None:
        """Wait until all tasks have ended by themselves, at most ``limit_s`` seconds."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=limit_s)

    async def stop(self) -> None:
        """Cancel all tasks and wait until they have ended, those that they start meanwhile too."""
        while self._tasks:
            for task in self._tasks:
                task.cancel()
            # A task may lose a cancellation (grpc.aio does, for a call that ends at that moment),
            # so those that are left are cancelled again.
            await asyncio.wait(self._tasks, timeout=_AGAIN_S)

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("background task failed", task=task.get_name(), exc_info=error)


async def _behind(work: Callable[[], Coroutine[Any, Any, Any]], hurry: asyncio.Event) -> Any:
    with suppress(TimeoutError):
        async with asyncio.timeout(BEHIND_S):
            await hurry.wait()
    return await work()
