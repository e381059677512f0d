"""Work that is not left half done when the one who waits for it is cancelled."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from typing import Any

T = TypeVar("T")


async def uninterrupted(work: Coroutine[Any, Any, T]) -> T:
    """Await ``work`` to its end. A cancellation in the meantime is raised after that.

    ``await uninterrupted(asyncio.to_thread(...))`` is how to be sure that the thread is done:
    a bare ``to_thread`` returns at once when it is cancelled, and its function runs on.
    """
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            if not task.cancelled():
                cancelled = error
        except Exception:
            break
    if cancelled is not None:
        if not task.cancelled():
            task.exception()  # it is overtaken by the cancellation: mark it as seen
        raise cancelled
    return task.result()
