"""What the content store and transfers stand on: locks by name, and work that is not cut off."""

from __future__ import annotations

import asyncio

import pytest

from services.containerd.keyed_lock import KeyedLock
from services.containerd.uninterrupted import uninterrupted


async def test_a_key_is_held_by_one_at_a_time_in_order_of_arrival() -> None:
    locks: KeyedLock[str] = KeyedLock()
    inside: list[int] = []
    order: list[int] = []

    async def work(number: int, key: str) -> None:
        async with locks.hold(key):
            inside.append(number)
            assert len(inside) == 1
            await asyncio.sleep(0)
            inside.remove(number)
            order.append(number)

    await asyncio.gather(*(work(number, "a") for number in range(5)))
    assert order == [0, 1, 2, 3, 4]
    assert len(locks) == 0


async def test_keys_do_not_wait_for_each_other() -> None:
    locks: KeyedLock[str] = KeyedLock()
    async with locks.hold("a"), asyncio.timeout(1), locks.hold("b"):
        assert len(locks) == 2


async def test_who_gives_up_waiting_leaves_the_key_to_others() -> None:
    locks: KeyedLock[str] = KeyedLock()

    async def wait() -> None:
        async with locks.hold("a"):
            pass

    async with locks.hold("a"):
        waiting = asyncio.ensure_future(wait())
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
    await wait()
    assert len(locks) == 0


async def test_uninterrupted_work_ends_before_its_cancellation_is_raised() -> None:
    begun, go_on, done = asyncio.Event(), asyncio.Event(), False

    async def work() -> str:
        nonlocal done
        begun.set()
        await go_on.wait()
        done = True
        return "result"

    task = asyncio.ensure_future(uninterrupted(work()))
    await begun.wait()
    for _ in range(2):
        task.cancel()
        await asyncio.sleep(0)
    assert not task.done()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert done


async def test_uninterrupted_work_gives_its_result_or_its_error() -> None:
    async def succeed() -> int:
        return 7

    async def fail() -> None:
        raise ValueError("no")

    assert await uninterrupted(succeed()) == 7
    with pytest.raises(ValueError, match="no"):
        await uninterrupted(fail())
