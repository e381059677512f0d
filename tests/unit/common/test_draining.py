"""What a stop does to calls that may take for ever."""

import asyncio

import pytest

from services.common.draining import Draining
from services.common.errors import Unavailable


@pytest.fixture
def draining():
    return Draining("the tier")


async def test_a_block_that_ends_by_itself_is_not_touched(draining):
    async with draining.endless():
        await asyncio.sleep(0)
    draining.drain()


async def test_a_drain_ends_those_under_way_and_those_to_come(draining):
    begun, cleaned = asyncio.Event(), asyncio.Event()

    async def call():
        async with draining.endless():
            begun.set()
            try:
                await asyncio.Event().wait()
            finally:
                cleaned.set()

    calling = asyncio.ensure_future(call())
    await begun.wait()
    draining.drain()
    with pytest.raises(Unavailable, match="the tier is stopping: ask again") as caught:
        await calling
    assert caught.value.retry_after_s is not None
    assert cleaned.is_set()
    with pytest.raises(Unavailable):
        await call()


async def test_a_caller_that_gives_up_is_cancelled(draining):
    begun = asyncio.Event()

    async def call():
        async with draining.endless():
            begun.set()
            await asyncio.Event().wait()

    calling = asyncio.ensure_future(call())
    await begun.wait()
    calling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await calling
    draining.drain()


async def test_a_time_limit_of_the_caller_stays_one(draining):
    with pytest.raises(TimeoutError):
        async with draining.endless(), asyncio.timeout(0):
            await asyncio.Event().wait()
    with pytest.raises(TimeoutError, match="theirs"):
        async with draining.endless():
            raise TimeoutError("theirs")
