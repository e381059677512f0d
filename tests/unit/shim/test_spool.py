from __future__ import annotations

import asyncio

import pytest

from services.shim.events import Event
from services.shim.spool import Spool


def event(number):
    return Event("/tasks/exit", {"pid": number})


def names(spool_directory):
    return sorted(int(path.name) for path in spool_directory.iterdir())


async def test_events_are_files_until_acknowledged_and_the_highest_stays(tmp_path):
    spool = Spool(tmp_path / "spool")
    assert (spool.first_seq, spool.last_seq, len(spool)) == (0, 0, 0)
    for number in range(1, 4):
        spool.emit(event(number))
    assert names(tmp_path / "spool") == [1, 2, 3]
    assert (spool.first_seq, spool.last_seq) == (1, 3)
    spool.acknowledge(2)
    assert names(tmp_path / "spool") == [3]
    assert spool.first_seq == 3
    spool.acknowledge(3)
    assert names(tmp_path / "spool") == [3]
    assert (spool.first_seq, spool.last_seq, len(spool)) == (4, 3, 0)
    spool.emit(event(4))
    spool.acknowledge(4)
    assert names(tmp_path / "spool") == [4]


async def test_successor_continues_the_sequence_with_what_was_not_acknowledged(tmp_path):
    first = Spool(tmp_path / "spool")
    for number in range(1, 5):
        first.emit(event(number))
    first.acknowledge(2)
    second = Spool(tmp_path / "spool")
    assert (second.first_seq, second.last_seq) == (3, 4)
    assert (await second.next(second.acked_seq)).event.fields == {"pid": 3}
    second.emit(event(5))
    assert second.last_seq == 5


async def test_recorded_event_is_on_the_disk_and_goes_out_only_when_offered(tmp_path):
    spool = Spool(tmp_path / "spool")
    held = spool.record(event(1))
    spool.emit(event(2))
    assert names(tmp_path / "spool") == [1, 2]
    waiting = asyncio.ensure_future(spool.next(0))
    await asyncio.sleep(0)
    assert not waiting.done()
    spool.offer(held)
    assert (await waiting).seq == 1
    assert (await spool.next(1)).seq == 2


async def test_event_stays_in_memory_when_the_disk_takes_none(tmp_path):
    failures = []
    spool = Spool(tmp_path / "spool", write_failed=lambda: failures.append(1))
    (tmp_path / "spool" / "1.tmp").mkdir()  # the write fails, whoever we are
    spool.emit(event(1))
    assert failures == [1]
    assert (await spool.next(0)).event.fields == {"pid": 1}
    spool.acknowledge(1)
    assert len(spool) == 0


async def test_odd_acknowledgements_are_harmless(tmp_path):
    spool = Spool(tmp_path / "spool")
    spool.emit(event(1))
    spool.acknowledge(0)
    assert len(spool) == 1
    spool.acknowledge(99)
    assert (spool.acked_seq, len(spool)) == (1, 0)
    spool.acknowledge(1)
    assert spool.acked_seq == 1


async def test_emptied_wakes_with_the_last_acknowledgement(tmp_path):
    spool = Spool(tmp_path / "spool")
    spool.emit(event(1))
    spool.emit(event(2))
    waiting = asyncio.ensure_future(spool.emptied())
    await asyncio.sleep(0)
    spool.acknowledge(1)
    await asyncio.sleep(0)
    assert not waiting.done()
    spool.acknowledge(2)
    async with asyncio.timeout(5):
        await waiting


@pytest.mark.parametrize("junk", ["7.tmp", "x", "."])
async def test_files_that_are_no_events_are_ignored(tmp_path, junk):
    (tmp_path / "spool").mkdir()
    if junk != ".":
        (tmp_path / "spool" / junk).write_text("")
    assert Spool(tmp_path / "spool").last_seq == 0
