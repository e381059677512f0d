"""Owned tasks end with their owner, whatever they do with a cancellation."""

import asyncio

import pytest
import structlog.testing

from services.common import background as module
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


async def test_work_behind_an_answer_lets_others_go_first():
    done = []

    async def work(name):
        done.append(name)

    async with Background() as background:
        behind = background.start_behind(lambda: work("behind"), name="behind")
        await background.start(work("next call"), name="next call")
        assert done == ["next call"]
        await behind
    assert done == ["next call", "behind"]


async def test_work_behind_an_answer_begins_at_once_if_it_is_waited_for(monkeypatch):
    monkeypatch.setattr(module, "BEHIND_S", 60.0)
    begun = []

    async def work(name):
        begun.append(name)

    async with Background() as background:
        first = background.start_behind(lambda: work("first"), name="first")
        background.hurry()
        second = background.start_behind(lambda: work("second"), name="second")
        async with asyncio.timeout(5):
            await first
        assert begun == ["first"]  # what comes later waits again
        background.hurry()
        async with asyncio.timeout(5):
            await second
    assert begun == ["first", "second"]


async def test_work_behind_an_answer_that_has_not_begun_ends_with_its_owner(monkeypatch):
    monkeypatch.setattr(module, "BEHIND_S", 60.0)

    async def work():
        raise AssertionError("it has begun")

    with structlog.testing.capture_logs() as logs:
        async with Background() as background:
            at_once = background.start_behind(work, name="has not had a turn")
            waiting = background.start_behind(work, name="waits")
            at_once.cancel()
            await asyncio.sleep(0)
    assert at_once.cancelled()
    assert waiting.cancelled()
    assert logs == []
