from __future__ import annotations

import asyncio
import itertools
import signal
from pathlib import Path

import pytest

from services.common.errors import FailedPrecondition, InvalidArgument, NotFound
from services.shim.process import (
    EXEC_TRANSITIONS,
    INIT_TRANSITIONS,
    Action,
    ExitRecord,
    Process,
    Status,
)
from services.shim.stdio.uris import Stdio

ALL = list(itertools.product(Status, Action))


def open_files():
    return len(list(Path("/proc/self/fd").iterdir()))


def process(exec_id="", status=Status.CREATED):
    made = Process("c", exec_id, Stdio())
    made.status = status
    return made


@pytest.mark.parametrize(("exec_id", "table"), [("", INIT_TRANSITIONS), ("e", EXEC_TRANSITIONS)])
async def test_every_pair_is_either_in_the_table_or_refused_by_name(exec_id, table):
    for status, action in ALL:
        one = process(exec_id, status)
        if (status, action) in table:
            one.apply(action)
            assert one.status is table[status, action]
            continue
        with pytest.raises((FailedPrecondition, NotFound)) as caught:
            one.check(action)
        assert str(status) in caught.value.message
        assert one.status is status


async def test_kill_of_an_ended_process_is_not_found_in_upstreams_words():
    with pytest.raises(NotFound, match="process already finished"):
        process(status=Status.STOPPED).check(Action.KILL)
    with pytest.raises(FailedPrecondition):
        process("e").check(Action.KILL)


@pytest.mark.parametrize("status", [Status.RUNNING, Status.PAUSED])
async def test_running_is_not_deleted(status):
    with pytest.raises(FailedPrecondition, match="cannot delete container 'c'"):
        process(status=status).check(Action.DELETE)


async def test_wait_ends_when_the_end_is_told_not_before():
    one = process(status=Status.RUNNING)
    waiting = asyncio.ensure_future(one.wait())
    one.ended(ExitRecord(7, 1))
    await asyncio.sleep(0)
    assert not waiting.done()
    one.tell()
    assert (await waiting).status == 7
    assert (await one.wait()).status == 7


async def test_wait_for_a_process_that_never_ran_ends_with_its_deletion():
    one = process("e")
    waiting = asyncio.ensure_future(one.wait())
    await asyncio.sleep(0)
    one.deleted()
    with pytest.raises(NotFound, match="before it was started"):
        await waiting


async def test_signals_go_to_that_very_process():
    child = await asyncio.create_subprocess_exec("/bin/sleep", "100")
    one = process(status=Status.RUNNING)
    one.created(child.pid)
    with pytest.raises(InvalidArgument):
        one.send_signal(1000)
    one.send_signal(signal.SIGTERM)
    assert await child.wait() == -signal.SIGTERM
    with pytest.raises(NotFound):
        one.send_signal(signal.SIGTERM)
    descriptors = open_files()
    one.ended(ExitRecord(143, 1))
    assert open_files() == descriptors - 1
    with pytest.raises(NotFound):
        one.send_signal(0)
