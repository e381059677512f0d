"""How often, and how soon, a request that failed for now is sent again."""

from __future__ import annotations

import asyncio
import random
import time
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, TypeVar

import structlog

from services.common.errors import Unavailable
from services.common.frozen import frozen

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
log = structlog.get_logger(__name__)

T = TypeVar("T")


@frozen
class RetryPolicy:
    """Bounds of retrying.

    Attributes:
        attempts: failures in a row after which the last one counts.
        first_delay_s: before the second attempt; doubled each time, give or take a half.
        max_delay_s: the longest delay of our own.
        retry_after_max_s: the longest delay that a server may ask for; more fails at once.
    """

    attempts: int = 5
    first_delay_s: float = 0.2
    max_delay_s: float = 5
    retry_after_max_s: float = 60


class Retry:
    """The failures in a row of one piece of work."""

    def __init__(self, policy: RetryPolicy) -> None:
        self._policy = policy
        self._failures = 0

    def progressed(self) -> None:
        """Note that something was achieved since: the next failure is a first one."""
        self._failures = 0

    async def wait(self, error: Unavailable) -> None:
        """Wait until the next attempt, or raise ``error`` if there is to be none."""
        policy = self._policy
        self._failures += 1
        wanted_s = error.retry_after_s or 0
        if self._failures >= policy.attempts or wanted_s > policy.retry_after_max_s:
            raise error
        delay_s = min(policy.first_delay_s * 2 ** (self._failures - 1), policy.max_delay_s)
        delay_s = max(delay_s * random.uniform(0.5, 1.5), wanted_s)
        log.info("request is retried", error=error.message, delay_s=round(delay_s, 3))
        await asyncio.sleep(delay_s)


async def retried(policy: RetryPolicy, work: Callable[[], Awaitable[T]]) -> T:
    """Do ``work`` until it does not raise Unavailable, or the policy ends it."""
    retry = Retry(policy)
    while True:
        try:
            return await work()
        except Unavailable as error:
            await retry.wait(error)


def parse_retry_after(value: str) -> float | None:
    """Seconds that a Retry-After header asks for (RFC 9110, 10.2.3); None if it does not parse."""
    if value.isascii() and value.isdigit():
        return float(value[:9])
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None
