"""A future that several may want to finish."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import asyncio

T = TypeVar("T")


def finish(future: asyncio.Future[T], result: T) -> None:
    """Give ``future`` its result, unless it has one or its waiter gave up."""
    if not future.done():
        future.set_result(result)
