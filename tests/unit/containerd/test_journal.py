"""The journal: gapless numbers, exactly-once events of shims, readers that follow, truncation."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import pytest

from services.common.background import Background
from services.common.database import Database
from services.common.errors import Internal, OutOfRange, Unavailable
from services.containerd.events.journal import Journal, JournalEntry, Truncated
from services.containerd.metadata import journal as rows
from services.containerd.metadata.schema import MIGRATIONS
from services.containerd.rpc.encoding import encode_event
from tests.fakes.eventually import eventually
from tests.fakes.metadata import Metadata, open_metadata

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import AsyncIterator
    from pathlib import Path

NS = "test"
SHIM = "0" * 32


@pytest.fixture
async def meta(tmp_path: Path) -> AsyncIterator[Metadata]:
    async with open_metadata(tmp_path) as opened:
        yield opened


async def append(meta: Metadata, *names: str, namespace: str = NS) -> None:
    for name in names:
        await meta.db.write(
            lambda tx, name=name: meta.journal.append(  # type: ignore[misc]
                tx, namespace, f"/{name}", "containerd.events.NamespaceDelete", {"name": name}
            )
        )


async def read(meta: Metadata, from_seq: int = 0, namespace: str = "") -> list[tuple[int, str]]:
    entries = meta.journal.read(from_seq, namespace=namespace, follow=False)
    return [(entry.seq, entry.topic) async for entry in entries]


async def test_numbers_have_no_gaps_whatever_is_rolled_back(meta: Metadata) -> None:
    def fail(tx: sqlite3.Connection) -> None:
        meta.journal.append(tx, NS, "/no", "containerd.events.NamespaceDelete", {"name": "no"})
        raise ZeroDivisionError

    writes = []
    for index in range(50):
        writes.append(append(meta, f"e{index}"))
        writes.append(meta.db.write(fail))
    outcomes = await asyncio.gather(*writes, return_exceptions=True)
    assert sum(isinstance(outcome, ZeroDivisionError) for outcome in outcomes) == 50
    entries = await read(meta)
    assert [seq for seq, _ in entries] == list(range(1, 51))
    assert {topic for _, topic in entries} == {f"/e{index}" for index in range(50)}


async def test_an_event_carries_its_message_and_time(meta: Metadata) -> None:
    before = time.time_ns()
    await append(meta, "a")
    [entry] = [entry async for entry in meta.journal.read(follow=False)]
    assert before <= entry.timestamp_ns <= time.time_ns()
    assert entry.event.type_url == "containerd.events.NamespaceDelete"
    assert entry.event.value == b"\x0a\x01a"


async def test_an_unknown_message_or_field_undoes_its_transaction(meta: Metadata) -> None:
    for type_name, fields in (
        ("containerd.events.Nothing", {}),
        ("containerd.events.NamespaceDelete", {"nome": "x"}),
    ):
        with pytest.raises(Internal):
            await meta.db.write(
                lambda tx, t=type_name, f=fields: meta.journal.append(tx, NS, "/x", t, f)  # type: ignore[misc]
            )
    assert await read(meta) == []


async def test_read_from_a_number_and_of_a_namespace(meta: Metadata) -> None:
    await append(meta, "a", "b")
    await append(meta, "c", namespace="other")
    await append(meta, "d")
    assert await read(meta, 3) == [(3, "/c"), (4, "/d")]
    assert await read(meta, 5) == []
    assert await read(meta, namespace=NS) == [(1, "/a"), (2, "/b"), (4, "/d")]
    with pytest.raises(OutOfRange, match="the newest is 4"):
        await read(meta, 6)


async def test_more_events_than_one_read_takes(meta: Metadata) -> None:
    await asyncio.gather(*(append(meta, f"e{index}") for index in range(600)))
    assert [seq for seq, _ in await read(meta)] == list(range(1, 601))


async def test_followers_get_each_event_once_and_in_order(meta: Metadata) -> None:
    async def take(count: int) -> list[int]:
        seen: list[int] = []
        async for entry in meta.journal.read(1):
            seen.append(entry.seq)
            if len(seen) == count:
                break
        return seen

    followers = [asyncio.create_task(take(200)) for _ in range(5)]
    await asyncio.gather(*(append(meta, f"a{index}") for index in range(100)))
    for index in range(100):
        await append(meta, f"b{index}")
    async with asyncio.timeout(10):
        for seen in await asyncio.gather(*followers):
            assert seen == list(range(1, 201))


async def test_a_follower_is_woken_by_an_event_that_comes_later(meta: Metadata) -> None:
    entries = meta.journal.read(1)
    waiting = asyncio.create_task(_next(entries))
    await meta.db.read(lambda tx: None)  # the follower's own reads come before this one
    assert not waiting.done()
    await append(meta, "late")
    async with asyncio.timeout(5):
        assert (await waiting).topic == "/late"


async def test_it_is_followed_from_the_first_follower_to_the_last(meta: Metadata) -> None:
    async def follow() -> None:
        async for _ in meta.journal.read():
            pass

    assert not meta.journal.is_followed
    assert await read(meta) == []
    assert not meta.journal.is_followed
    async with Background() as background:
        for _ in range(2):
            background.start(follow(), name="follower")
        await eventually(lambda: meta.journal.is_followed)
    assert not meta.journal.is_followed


async def test_a_stop_ends_followers_after_what_they_have_not_read(meta: Metadata) -> None:
    await append(meta, "a")
    entries = meta.journal.read(1)
    meta.journal.stop()
    assert (await _next(entries)).topic == "/a"
    with pytest.raises(Unavailable, match="read on from event 2"):
        await _next(entries)


async def test_a_shims_event_is_recorded_once_however_often_it_comes(meta: Metadata) -> None:
    async def send(seq: int, shim: str = SHIM) -> bool:
        return await meta.db.write(
            lambda tx: meta.journal.append_shim_event(
                tx,
                shim,
                seq,
                namespace=NS,
                topic=f"/tasks/{seq}",
                type_url="containerd.events.TaskExit",
                value=b"",
                timestamp_ns=5,
            )
        )

    assert [await send(1), await send(2), await send(1), await send(2), await send(3)] == [
        True,
        True,
        False,
        False,
        True,
    ]
    assert await send(1, shim="f" * 32)
    assert await read(meta) == [(1, "/tasks/1"), (2, "/tasks/2"), (3, "/tasks/3"), (4, "/tasks/1")]
    assert await meta.db.read(lambda tx: meta.journal.shim_progress(tx, SHIM)) == 3
    await meta.db.write(lambda tx: meta.journal.forget_shim(tx, SHIM))
    assert await meta.db.read(lambda tx: meta.journal.shim_progress(tx, SHIM)) == 0


async def test_truncation_tells_readers_instead_of_skipping(tmp_path: Path) -> None:
    async with open_metadata(tmp_path) as meta:
        meta.journal = Journal(meta.db, encode_event, keep_events=3)
        await append(meta, *"abcdefg")
        slow = meta.journal.read(1)
        assert (await _next(slow)).seq == 1
        assert await meta.journal.truncate() == 4
        assert await read(meta) == [(5, "/e"), (6, "/f"), (7, "/g")]
        assert await read(meta, 5) == await read(meta)
        with pytest.raises(Truncated, match="first is 5") as caught:
            await read(meta, 4)
        assert caught.value.first_seq == 5


async def test_a_reader_that_truncation_overtakes_is_told(tmp_path: Path) -> None:
    async with open_metadata(tmp_path) as meta:
        meta.journal = Journal(meta.db, encode_event, keep_events=1)
        meta.journal.attach()
        entries = meta.journal.read(1)
        waiting = asyncio.create_task(_next(entries))
        await append(meta, "a")
        assert (await waiting).seq == 1
        await append(meta, "b", "c")
        await meta.journal.truncate()
        with pytest.raises(Truncated):
            await _next(entries)


async def test_truncation_by_age_keeps_the_newest_for_its_number(tmp_path: Path) -> None:
    async with open_metadata(tmp_path) as meta:
        journal = Journal(meta.db, encode_event, keep_s=0)
        await append(meta, "a", "b")
        assert await journal.truncate() == 1
        assert await read(meta) == [(2, "/b")]
        await append(meta, "c")
        assert (await read(meta))[-1] == (3, "/c")


async def test_truncation_by_size_keeps_the_newest_that_fit(tmp_path: Path) -> None:
    async with open_metadata(tmp_path) as meta:
        await append(meta, *"abcdef")
        size = await meta.db.read(
            lambda tx: tx.execute(
                "SELECT length(value) + length(topic) + length(type_url) FROM journal"
            ).fetchone()[0]
        )
        assert await Journal(meta.db, encode_event, keep_bytes=6 * size).truncate() == 0
        assert await Journal(meta.db, encode_event, keep_bytes=3 * size + 1).truncate() == 3
        assert await read(meta) == [(4, "/d"), (5, "/e"), (6, "/f")]
        assert await Journal(meta.db, encode_event, keep_bytes=1).truncate() == 2
        assert await read(meta) == [(6, "/f")]


async def test_much_at_once_is_cut_off_at_once(tmp_path: Path) -> None:
    async with open_metadata(tmp_path) as meta, Background() as background:
        meta.journal = Journal(meta.db, encode_event, keep_bytes=10_000)
        meta.journal.attach()
        background.start(meta.journal.keep_bounded(), name="bounds")
        for _ in range(100):
            await meta.db.write(
                lambda tx: meta.journal.append_encoded(
                    tx, NS, "/much", type_url="t", value=bytes(1000)
                )
            )
        await eventually(lambda: _bytes_below(meta, 20_000))


async def test_a_shims_progress_outlives_truncation(tmp_path: Path) -> None:
    async with open_metadata(tmp_path) as meta:
        journal = Journal(meta.db, encode_event, keep_events=1)
        message = {"namespace": NS, "topic": "/t", "type_url": "t", "value": b""}
        for seq in (1, 2):
            await meta.db.write(
                lambda tx, seq=seq: journal.append_shim_event(  # type: ignore[misc]
                    tx, SHIM, seq, timestamp_ns=1, **message
                )
            )
        await append(meta, "x")
        await journal.truncate()
        assert not await meta.db.write(
            lambda tx: journal.append_shim_event(tx, SHIM, 2, timestamp_ns=1, **message)  # type: ignore[arg-type]
        )


async def test_numbers_go_on_after_a_restart(tmp_path: Path) -> None:
    async with open_metadata(tmp_path) as meta:
        await append(meta, "a", "b")
    async with open_metadata(tmp_path) as meta:
        await append(meta, "c")
        assert await read(meta) == [(1, "/a"), (2, "/b"), (3, "/c")]


async def test_an_empty_journal_begins_at_one(tmp_path: Path) -> None:
    db = Database(tmp_path / "x.db")
    db.open(MIGRATIONS)
    journal = Journal(db, encode_event)
    assert await journal.last_seq() == 0
    assert [entry async for entry in journal.read(1, follow=False)] == []
    assert await journal.truncate() == 0
    db.close()


async def _next(entries: AsyncIterator[JournalEntry]) -> JournalEntry:
    return await anext(entries)


async def _bytes_below(meta: Metadata, limit: int) -> bool:
    total = await meta.db.read(
        lambda tx: tx.execute("SELECT sum(length(value)) FROM journal").fetchone()[0]
    )
    return bool(total < limit)


async def test_a_reader_does_not_pay_for_the_length_of_the_journal(meta: Metadata) -> None:
    def fill(tx: sqlite3.Connection) -> None:
        for _ in range(5000):
            meta.journal.append(tx, NS, "/e", "containerd.events.NamespaceDelete", {"name": "e"})

    await meta.db.write(fill)
    steps = 0

    def count() -> None:
        nonlocal steps
        steps += 100

    def bounds(tx: sqlite3.Connection) -> tuple[int, int]:
        tx.set_progress_handler(count, 100)
        try:
            return rows.bounds(tx)
        finally:
            tx.set_progress_handler(None, 0)

    assert meta.db.look(bounds) == (1, 5000)
    assert steps < 1000
