"""Owned tasks end with their owner, whatever they do with a cancellation."""

import asyncio

import pytest
import structlog.testing

from services.common.background import Background


async def test_tasks_end_with_their_owner():
    ended = asyncio.Event()

    async def work():
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async with Background() as background:
        background.start(work(), name="work")
        await asyncio.sleep(0)
    assert ended.is_set()


async def test_a_task_that_loses_a_cancellation_is_cancelled_again():
    lost = 0

    async def work():
        nonlocal lost
        while lost < 2:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                lost += 1
        await asyncio.Event().wait()

    background = Background()
    task = background.start(work(), name="stubborn")
    await asyncio.sleep(0)
    async with asyncio.timeout(10):
        await background.stop()
    assert task.cancelled()
    assert lost == 2


async def test_a_failure_is_logged_once_with_its_name():
    async def work():
        raise ValueError("no")

    with structlog.testing.capture_logs() as logs:
        async with Background() as background:
            task = background.start(work(), name="broken")
            with pytest.raises(ValueError, match="no"):
                await task
    (line,) = logs
    assert line["event"] == "background task failed"
    assert line["task"] == "broken"
