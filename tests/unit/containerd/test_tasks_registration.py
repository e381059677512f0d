"""One registration stream: events gather while a commit waits, and are acknowledged after it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from services.common.errors import Aborted, TheseusError
from services.containerd.clients.shim_events import ShimEventCodec
from services.containerd.tasks.bundle import Bundle
from services.containerd.tasks.journal import ExitNotice, ShimEvent
from services.containerd.tasks.known import KnownShim, Standing
from services.containerd.tasks.registration import ShimSession
from services.containerd.tasks.shim import ProcessExit, TaskNotFound
from services.containerd.typed import TypedValue

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

CODEC = ShimEventCodec()


class SlowJournal:
    """Stands in for ``TaskJournal``: a commit ends when it is let."""

    def __init__(self) -> None:
        self.codec = CODEC
        self.is_followed = False
        self.batches: list[list[int]] = []
        self.entered = asyncio.Event()
        self.let = asyncio.Semaphore(0)

    async def record(self, namespace: str, instance_id: str, events: Sequence[ShimEvent]) -> None:
        self.batches.append([event.seq for event in events])
        self.entered.set()
        await self.let.acquire()


@pytest.fixture
def known(tmp_path: Path) -> KnownShim:
    return KnownShim(Bundle("ns", "c1", tmp_path), "0" * 32, Standing.EXPECTED)


@pytest.fixture
def journal() -> SlowJournal:
    return SlowJournal()


def session_of(known: KnownShim, journal: Any, progress: int = 0) -> ShimSession:
    return ShimSession(known, journal, progress=progress, closed=lambda _: None)


def event(seq: int, topic: str = "/tasks/oom") -> ShimEvent:
    return ShimEvent(seq, 1, topic, TypedValue("x", b""))


async def test_events_gather_while_a_commit_waits_for_the_disk(
    known: KnownShim, journal: SlowJournal
) -> None:
    session = session_of(known, journal)
    await session.offer(event(1))
    first = asyncio.ensure_future(session.next_ack())
    await journal.entered.wait()
    for seq in range(2, 102):
        await session.offer(event(seq))
    assert not first.done()
    journal.let.release()
    assert await first == 1
    journal.let.release()
    assert await session.next_ack() == 101
    assert journal.batches == [[1], list(range(2, 102))]


async def test_events_that_nobody_waits_for_are_journaled_with_the_next_one(
    known: KnownShim, journal: SlowJournal
) -> None:
    session = session_of(known, journal)
    journal.let.release()
    acking = asyncio.ensure_future(session.next_ack())
    await session.offer(event(1, "/tasks/create"))
    await session.offer(event(2, "/tasks/start"))
    await asyncio.sleep(0)
    assert journal.batches == []
    await session.offer(event(3, "/tasks/oom"))
    assert await acking == 3
    assert journal.batches == [[1, 2, 3]]


@pytest.mark.parametrize("is_followed", [False, True])
async def test_an_exit_waits_for_the_deletion_unless_somebody_follows_the_journal(
    known: KnownShim, journal: SlowJournal, is_followed: bool
) -> None:
    journal.is_followed = is_followed
    session = session_of(known, journal)
    journal.let.release()
    acking = asyncio.ensure_future(session.next_ack())
    await session.offer(event(1, "/tasks/exit"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert journal.batches == ([[1]] if is_followed else [])
    await session.offer(event(2, "/tasks/delete"))
    journal.let.release()
    acknowledged = [await acking]
    if is_followed:
        acknowledged.append(await session.next_ack())
    assert acknowledged == ([1, 2] if is_followed else [2])


async def test_without_a_next_one_they_are_journaled_soon(
    known: KnownShim, journal: SlowJournal
) -> None:
    session = session_of(known, journal)
    journal.let.release()
    await session.offer(event(1, "/tasks/exec-added"))
    async with asyncio.timeout(5):
        assert await session.next_ack() == 1
        await session.offer(event(2, "/tasks/exec-started"))
        journal.let.release()
        assert await session.next_ack() == 2


async def test_those_that_gather_are_journaled_when_the_session_ends(
    known: KnownShim, journal: SlowJournal
) -> None:
    session = session_of(known, journal)
    journal.let.release()
    await session.offer(event(1, "/tasks/create"))
    session.end()
    assert await session.next_ack() == 1
    assert await session.next_ack() is None


async def test_a_shim_that_sends_faster_than_the_disk_waits(
    known: KnownShim, journal: SlowJournal
) -> None:
    session = session_of(known, journal)

    async def send() -> None:
        for seq in range(1, 601):
            await session.offer(event(seq))
        session.end()

    sending = asyncio.ensure_future(send())
    first = asyncio.ensure_future(session.next_ack())
    await journal.entered.wait()
    assert not sending.done()
    journal.let.release()
    assert await first == 256
    acknowledged = 256
    while acknowledged is not None and acknowledged < 600:
        journal.let.release()
        acknowledged = await session.next_ack()
    await sending
    assert await session.next_ack() is None
    assert [seq for batch in journal.batches for seq in batch] == list(range(1, 601))
    assert max(map(len, journal.batches)) == 256


async def test_what_was_sent_again_is_acknowledged_again(
    known: KnownShim, journal: SlowJournal
) -> None:
    session = session_of(known, journal, progress=5)
    journal.let.release()
    await session.offer(event(4))
    assert await session.next_ack() == 5


async def test_a_newer_session_ends_the_older(known: KnownShim, journal: SlowJournal) -> None:
    session = session_of(known, journal)
    await session.offer(event(1))
    session.replace()
    with pytest.raises(Aborted):
        await session.next_ack()
    assert journal.batches == []


async def test_exits_are_remembered_once_they_are_journaled(
    known: KnownShim, journal: SlowJournal
) -> None:
    session = session_of(known, journal)
    end = ProcessExit(3, 1_000, 9)
    message = CODEC.encode_exit(ExitNotice("c1", "e1", end))
    await session.offer(ShimEvent(1, 1, "/tasks/exit", message))
    acking = asyncio.ensure_future(session.next_ack())
    await journal.entered.wait()
    assert known.exits == {}
    journal.let.release()
    await acking
    assert known.exits == {"e1": end}


async def test_a_call_waits_until_the_shim_is_settled(known: KnownShim) -> None:
    asking = asyncio.ensure_future(known.ready())
    await known.change(timeout_s=0.01)
    assert not asking.done()
    known.turn(Standing.REMOVED)
    with pytest.raises(TaskNotFound):
        await asking


@pytest.mark.parametrize("standing", [Standing.STARTING, Standing.REMOVING, Standing.SILENT])
async def test_a_shim_that_cannot_answer_is_told_so(known: KnownShim, standing: Standing) -> None:
    known.turn(standing)
    with pytest.raises(TheseusError, match="task 'c1'"):
        await known.ready()
