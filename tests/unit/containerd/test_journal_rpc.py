"""The journal's service: only some topics, and how far it has come all the same."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from protos.theseus.journal.v1 import journal_pb2 as pb
from services.containerd.rpc import journal as module
from services.containerd.rpc.journal import JournalService
from tests.fakes.metadata import Metadata, open_metadata

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

CONTEXT: Any = None


@pytest.fixture
async def meta(tmp_path: Path) -> AsyncIterator[Metadata]:
    async with open_metadata(tmp_path) as opened:
        yield opened


async def append(meta: Metadata, *topics: str) -> None:
    def record(tx: Any) -> None:
        for topic in topics:
            meta.journal.append_encoded(tx, "n", topic, type_url="t", value=b"")

    await meta.db.write(record)


async def read(meta: Metadata, **request: Any) -> list[tuple[str, int]]:
    service = JournalService(meta.journal)
    answers = service.Read(pb.ReadRequest(no_follow=True, **request), CONTEXT)
    return [(answer.entry.topic, answer.next_seq) async for answer in answers]


async def test_without_topics_all_events_come(meta: Metadata) -> None:
    await append(meta, "/a", "/b")
    assert await read(meta) == [("/a", 2), ("/b", 3)]


async def test_only_the_topics_that_are_asked_for_come_and_the_end(meta: Metadata) -> None:
    await append(meta, "/a", "/b", "/c", "/b", "/a", "/a")
    assert await read(meta, topics=["/b", "/c"]) == [("/b", 3), ("/c", 4), ("/b", 5), ("", 7)]
    assert (await read(meta, topics=["/a"]))[-1] == ("/a", 7)
    assert await read(meta, topics=["/none"]) == [("", 7)]
    assert await read(meta, topics=["/none"], **{"from": 7}) == []


async def test_many_that_are_passed_over_are_told_of(
    meta: Metadata, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PASSED_OVER_MAX", 3)
    await append(meta, *["/a"] * 7, "/b", "/a")
    assert await read(meta, topics=["/b"]) == [("", 4), ("", 7), ("/b", 9), ("", 10)]


async def test_who_follows_hears_of_what_it_asked_for_alone(meta: Metadata) -> None:
    service = JournalService(meta.journal)
    answers = service.Read(pb.ReadRequest(topics=["/b"]), CONTEXT)
    first = asyncio.ensure_future(anext(answers))
    await append(meta, "/a")
    await append(meta, "/b")
    async with asyncio.timeout(5):
        answer = await first
    assert (answer.entry.topic, answer.next_seq) == ("/b", 3)
    await answers.aclose()
