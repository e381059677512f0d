from __future__ import annotations

import asyncio
import random

import pytest

from services.common.errors import OutOfRange
from services.shim.stdio import extents, output
from services.shim.stdio.extents import Extents
from services.shim.stdio.formats import JsonFileFormat
from services.shim.stdio.log_writer import LogWriter
from services.shim.stdio.output import Gap, Output, Piece

BIG = 100_000


async def read_all(reader):
    found = []
    while (piece := await reader.read()) is not None:
        found.append(piece)
        reader.advance(piece)
    return found


def joined(found):
    """Bytes by stream; offsets must follow one another."""
    streams, at = {}, found[0].offset if isinstance(found[0], Piece) else found[0].start
    for piece in found:
        if isinstance(piece, Gap):
            assert piece.start == at
            at = piece.end
            continue
        assert piece.offset == at
        at += len(piece.data)
        streams[piece.stream] = streams.get(piece.stream, b"") + piece.data
    return streams


@pytest.fixture
async def stream():
    made = Output(None, streams=1)
    yield made
    await made.close()


@pytest.fixture
async def logged(tmp_path):
    made = Output(LogWriter(tmp_path / "c.log", JsonFileFormat()), streams=2)
    yield made
    await made.close()


async def test_readers_get_everything_from_where_they_begin(stream):
    stream.write("stdout", b"hello ")
    first = stream.attach(0, from_end=False, follow=True)
    second = stream.attach(0, from_end=True, follow=True)
    third = stream.attach(2, from_end=False, follow=False)
    stream.write("stdout", b"world")
    stream.finish("stdout")
    assert joined(await read_all(first)) == {"stdout": b"hello world"}
    assert joined(await read_all(second)) == {"stdout": b"world"}
    assert joined(await read_all(third)) == {"stdout": b"llo "}
    with pytest.raises(OutOfRange, match="past the end"):
        stream.attach(12, from_end=False, follow=True)


async def test_waiting_reader_is_woken(stream):
    reader = stream.attach(0, from_end=False, follow=True)
    reading = asyncio.ensure_future(reader.read())
    await asyncio.sleep(0)
    assert not reading.done()
    stream.write("stdout", b"x")
    assert (await reading).data == b"x"


async def test_process_waits_for_the_slowest_reader(stream):
    fast = stream.attach(0, from_end=False, follow=True)
    slow = stream.attach(0, from_end=False, follow=True)
    while stream.ready:
        stream.write("stdout", b"x" * BIG)
    assert stream.end >= output.AHEAD_MAX_BYTES
    ready = asyncio.Event()
    stream.when_ready(ready.set)
    while fast.offset < stream.end:
        fast.advance(await fast.read())
    assert not ready.is_set()
    while slow.offset < stream.end // 2:
        slow.advance(await slow.read())
    assert ready.is_set()
    assert stream.ready
    fast.close()
    slow.close()


async def test_reader_that_comes_back_finds_what_was_under_way(stream):
    reader = stream.attach(0, from_end=False, follow=True)
    written = b""
    for number in range(60):
        data = bytes([number]) * BIG
        written += data
        stream.write("stdout", data)
        while reader.offset < stream.end:
            reader.advance(await reader.read())
    reader.close()
    # All was handed over, but the connection broke with two MiB in it.
    resumed = len(written) - (2 << 20)
    reader = stream.attach(resumed, from_end=False, follow=False)
    assert joined(await read_all(reader)) == {"stdout": written[resumed:]}
    reader.close()


async def test_nobody_is_waited_for_once_the_grace_is_over(monkeypatch):
    monkeypatch.setattr(output, "RECONNECT_GRACE_S", 0.01)
    dropped = []
    stream = Output(None, streams=1, dropped=lambda name, count: dropped.append(count))
    reader = stream.attach(0, from_end=False, follow=True)
    while stream.ready:
        stream.write("stdout", b"a" * BIG)
    waiting = asyncio.Event()
    stream.when_ready(waiting.set)
    await asyncio.sleep(0.05)
    assert not waiting.is_set()  # a reader is there, if slow
    reader.close()
    async with asyncio.timeout(5):
        await waiting.wait()
    for _ in range(20):
        assert stream.ready
        stream.write("stdout", b"b" * BIG)
    assert sum(dropped) == stream.start > 0
    reader = stream.attach(0, from_end=False, follow=False)
    found = await read_all(reader)
    assert found[0] == Gap(0, stream.start)
    assert joined(found) == {"stdout": b"b" * (stream.end - stream.start)}
    reader.close()
    await stream.close()


async def test_process_waits_for_its_first_reader_too(stream):
    while stream.ready:
        stream.write("stdout", b"x" * BIG)
    assert stream.end < output.AHEAD_MAX_BYTES + BIG + 1
    assert stream.start == 0
    assert stream.abandoned


async def test_slow_reader_is_served_from_the_log(logged):
    source = random.Random(7)
    expected = {"stdout": b"", "stderr": b""}
    reader = logged.attach(0, from_end=False, follow=True)
    for number in range(3000):
        stream = source.choice(["stdout", "stderr"])
        end = source.choice([b"\n", b"\n", b""])
        data = b"%d " % number + "é".encode() * source.randrange(400) + end
        expected[stream] += data
        logged.write(stream, data)
        if number % 100 == 0:
            await logged.settle()
        assert logged.ready
    logged.finish("stdout")
    logged.finish("stderr")
    assert logged.start > 0
    assert joined(await read_all(reader)) == expected
    reader.close()


async def test_bytes_that_a_log_cannot_keep_wait_for_who_is_attached(logged):
    reader = logged.attach(0, from_end=False, follow=True)
    whole = random.Random(3).randbytes(80 * 65536)
    pieces = [whole[at : at + 65536] for at in range(0, len(whole), 65536)]
    sent = 0
    while logged.ready:
        logged.write("stdout", pieces[sent])
        await logged.settle()
        sent += 1
    assert sent < len(pieces)

    async def write_on():
        for piece in pieces[sent:]:
            ready = asyncio.Event()
            logged.when_ready(ready.set)
            await ready.wait()
            logged.write("stdout", piece)
        logged.finish("stdout")
        logged.finish("stderr")

    async with asyncio.timeout(30):
        writing = asyncio.create_task(write_on())
        found = await read_all(reader)
        await writing
    assert not [piece for piece in found if isinstance(piece, Gap)]
    assert joined(found) == {"stdout": whole}


async def test_a_reader_that_leaves_holds_up_nobody(logged):
    reader = logged.attach(0, from_end=False, follow=True)
    while logged.ready:
        logged.write("stdout", b"\xff" * 65536)
        await logged.settle()
    ready = asyncio.Event()
    logged.when_ready(ready.set)
    logged.detach(reader)
    async with asyncio.timeout(10):
        await ready.wait()
    assert logged.ready


async def test_many_small_writes_take_little_memory(stream):
    reader = stream.attach(0, from_end=False, follow=True)
    for _ in range(20000):
        stream.write("stdout", b"x\n")
    assert len(stream._chunks) <= 4
    found = []
    stream.finish("stdout")
    found = await read_all(reader)
    assert joined(found) == {"stdout": b"x\n" * 20000}
    reader.close()


def test_extents_forget_the_oldest(monkeypatch):
    record = Extents()
    for number in range(extents.EXTENTS_MAX + 10):
        record.add(number, "stdout" if number % 2 else "stderr", number // 2)
    assert record.find(3) is None
    assert record.first_offset(0) == 10
    found = record.find(11)
    assert (found.start, found.end, found.stream, found.stream_start) == (11, 12, "stdout", 5)
    record.add(extents.EXTENTS_MAX + 10, "stdout", 99)
    last = record.find(extents.EXTENTS_MAX + 100)
    assert last.end is None
