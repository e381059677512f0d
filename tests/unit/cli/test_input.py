"""Input that can be sent again, and the keys that detach."""

import asyncio
import os

import pytest

from services.cli import input as inputs
from services.cli.terminal import DetachFilter
from services.common.errors import DataLoss


def test_any_part_can_be_sent_again():
    kept = inputs.Input(lambda: None)
    kept.feed(b"hello ")
    kept.feed(b"world")
    assert kept.piece(0) == b"hello world"
    assert kept.piece(6) == b"world"
    assert kept.piece(11) == b""
    kept.check(11)
    with pytest.raises(DataLoss, match="cannot be resumed at byte 12"):
        kept.check(12)


def test_a_second_writer_begins_where_the_first_one_ended():
    kept = inputs.Input(lambda: None)
    kept.begin(100)
    kept.feed(b"x")
    assert kept.piece(100) == b"x"
    with pytest.raises(DataLoss):
        kept.check(99)


def test_what_was_sent_is_forgotten_past_a_bound(monkeypatch):
    monkeypatch.setattr(inputs, "_KEPT_BYTES", 10)
    kept = inputs.Input(lambda: None)
    kept.feed(b"0123456789abcdef")
    kept.check(0)
    assert kept.piece(0) == b"0123456789abcdef"
    kept.check(6)
    with pytest.raises(DataLoss):
        kept.check(5)


async def test_a_pipe_is_read_to_its_end_with_bounded_memory(monkeypatch):
    monkeypatch.setattr(inputs, "_AHEAD_BYTES", 1 << 16)
    monkeypatch.setattr(inputs, "_KEPT_BYTES", 1 << 16)
    changed = asyncio.Event()
    kept = inputs.Input(changed.set)
    reader, writer = os.pipe()
    data = os.urandom(1 << 20)

    def write():
        with os.fdopen(writer, "wb") as stream:
            stream.write(data)

    kept.read_from(reader)
    writing = asyncio.create_task(asyncio.to_thread(write))
    got = bytearray()
    while not (kept.ended and len(got) == kept.end):
        await changed.wait()
        changed.clear()
        while piece := kept.piece(len(got)):
            got += piece
            assert kept.end - len(got) <= (1 << 16) + (1 << 15)
    await writing
    os.close(reader)
    assert got == data


@pytest.mark.parametrize(
    ("typed", "passed", "detached"),
    [
        ([b"abc"], b"abc", False),
        ([b"\x10\x11"], b"", True),
        ([b"a\x10", b"\x11b"], b"a", True),
        ([b"\x10", b"x"], b"\x10x", False),
        ([b"\x10\x10", b"\x11"], b"\x10", True),
        ([b"\x11\x10"], b"\x11", False),
    ],
)
def test_detach_keys(typed, passed, detached):
    calls = []
    keys = DetachFilter(lambda: calls.append(1))
    assert b"".join(keys(piece) for piece in typed) == passed
    assert bool(calls) == detached
