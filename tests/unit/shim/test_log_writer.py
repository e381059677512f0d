from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from services.common.errors import FailedPrecondition
from services.shim.stdio import log_index, log_reader, log_writer
from services.shim.stdio.formats import CriFormat, JsonFileFormat, RawFormat
from services.shim.stdio.log_index import Place, StreamIndex
from services.shim.stdio.log_writer import LogWriter


class Log:
    """A log writer that is closed after the test, and what it dropped."""

    def __init__(self, path, form=None, **options):
        self.dropped = []
        self.writer = LogWriter(
            path,
            form or JsonFileFormat(),
            dropped=lambda stream, count: self.dropped.append((stream, count)),
            **options,
        )

    async def write(self, data, stream="stdout"):
        self.writer.write(stream, data)
        await self.writer.settle()

    async def read_all(self, stream, end):
        """Everything of a stream by way of the index; gaps as ranges."""
        offset, found = 0, []
        while offset < end:
            data, following = await asyncio.to_thread(
                log_reader.read, self.writer, stream, offset, end - offset
            )
            if data:
                found.append(data)
                offset += len(data)
            else:
                found.append((offset, following))
                offset = following
        return found


@pytest.fixture
async def make_log():
    logs = []

    def make(path, form=None, **options):
        logs.append(Log(path, form, **options))
        return logs[-1]

    yield make
    for log in logs:
        await log.writer.close()


def entries(path: Path):
    return [json.loads(line)["log"] for line in path.read_text().splitlines()]


async def test_lines_are_appended_and_an_unfinished_one_at_the_end(make_log, tmp_path):
    path = tmp_path / "new" / "c.log"
    log = make_log(path)
    await log.write(b"one\ntw")
    await log.write(b"err\n", "stderr")
    await log.write(b"o\nrest")
    log.writer.finish("stdout")
    await log.writer.settle()
    assert entries(path) == ["one\n", "err\n", "two\n", "rest"]


async def test_rotation_keeps_so_many_files_of_so_much(make_log, tmp_path):
    path = tmp_path / "c.log"
    log = make_log(path, max_size_bytes=1000, max_files=3)
    lines = [b"%04d\n" % number for number in range(100)]
    await log.write(b"".join(lines))
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["c.log", "c.log.1", "c.log.2"]
    # A file is closed by the line with which it reaches the size.
    for file in files[1:]:
        line = len(file.read_bytes().splitlines(keepends=True)[-1])
        assert 1000 <= file.stat().st_size < 1000 + line
    kept = entries(files[2]) + entries(files[1]) + entries(files[0])
    assert kept == [line.decode() for line in lines[-len(kept) :]]


async def test_single_file_begins_anew(make_log, tmp_path):
    path = tmp_path / "c.log"
    log = make_log(path, max_size_bytes=200, max_files=1)
    for number in range(10):
        await log.write(b"%d\n" % number)
    assert [file.name for file in tmp_path.iterdir()] == ["c.log"]
    assert entries(path)[-1] == "9\n"
    assert path.stat().st_size < 400


async def test_bytes_are_read_back_across_rotation_and_interleaving(make_log, tmp_path):
    log = make_log(tmp_path / "c.log", max_size_bytes=3000, max_files=100)
    expected = {"stdout": b"", "stderr": b""}
    for number in range(400):
        stream = "stderr" if number % 3 else "stdout"
        data = b"line %d of %s\n" % (number, stream.encode())
        expected[stream] += data
        log.writer.write(stream, data)
    await log.writer.settle()
    for stream, data in expected.items():
        assert b"".join(await log.read_all(stream, len(data))) == data
        middle = len(data) // 2 + 3
        got, _ = log_reader.read(log.writer, stream, middle, 10)
        assert got == data[middle : middle + 10]


async def test_what_was_rotated_away_or_is_no_text_is_a_gap(make_log, tmp_path):
    log = make_log(tmp_path / "c.log", max_size_bytes=500, max_files=2)
    lines = b"".join(b"%04d\n" % number for number in range(50))
    await log.write(lines)
    found = await log.read_all("stdout", len(lines))
    assert found[0][0] == 0
    assert isinstance(found[0], tuple)
    assert b"".join(found[1:]) == lines[found[0][1] :]

    other = make_log(tmp_path / "d.log")
    await other.write(b"good\n")
    await other.write(b"\xff\xfe\n")
    await other.write(b"good again\n")
    assert await other.read_all("stdout", 19) == [b"good\n", (5, 8), b"good again\n"]


async def test_full_disk_drops_and_counts(make_log, tmp_path):
    log = make_log(Path("/dev/full"))
    await log.write(b"lost\n")
    await asyncio.sleep(0)
    assert log.dropped == [("stdout", 5)]
    assert await log.read_all("stdout", 5) == [(0, 5)]


async def test_full_disk_makes_the_container_wait_where_it_was_told_to(
    make_log, tmp_path, monkeypatch
):
    monkeypatch.setattr(log_writer, "_RETRY_S", 0.005)
    log = make_log(Path("/dev/full"), block_on_full=True)
    big = b"x" * (log_writer.QUEUE_MAX_BYTES // 2) + b"\n"
    await log.write(big)  # settles although nothing can be written
    log.writer.write("stdout", big)
    assert not log.writer.ready
    ready = asyncio.Event()
    log.writer.when_ready(ready.set)
    monkeypatch.setattr(log.writer, "_append_whole", lambda data: None)  # there is space again
    async with asyncio.timeout(10):
        await ready.wait()
        await log.writer.settle()
    assert log.dropped == []


async def test_torn_line_is_cut_off_again(make_log, tmp_path, monkeypatch):
    path = tmp_path / "c.log"
    log = make_log(path)
    await log.write(b"whole\n")
    write, writev = log_writer.os.write, log_writer.os.writev

    def half(fd, pieces):
        monkeypatch.setattr(log_writer.os, "writev", writev)
        monkeypatch.setattr(log_writer.os, "write", broken)
        return write(fd, pieces[0])

    def broken(fd, data):
        monkeypatch.setattr(log_writer.os, "write", write)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(log_writer.os, "writev", half)
    await log.write(b"torn\n")
    await log.write(b"next\n")
    assert entries(path) == ["whole\n", "next\n"]
    await asyncio.sleep(0)
    assert log.dropped == [("stdout", 5)]


async def test_reopen_goes_on_in_a_new_file(make_log, tmp_path):
    path = tmp_path / "c.log"
    log = make_log(path)
    await log.write(b"old\n")
    path.rename(tmp_path / "moved")
    log.writer.reopen()
    await log.write(b"new\n")
    assert entries(tmp_path / "moved") == ["old\n"]
    assert entries(path) == ["new\n"]
    assert await log.read_all("stdout", 8) == [(0, 4), b"new\n"]


async def test_cri_lines_are_read_back_by_offset(make_log, tmp_path):
    path = tmp_path / "c.log"
    log = make_log(path, CriFormat(), max_size_bytes=400, max_files=20)
    sent = [b"first\n", b"\xff\0 no text\n", b"x" * 20000 + b"\n", b"par", b"tial\n", b"rest"]
    for data in sent:
        await log.write(data)
    log.writer.finish("stdout")
    await log.writer.settle()
    lines = path.read_bytes().splitlines()
    assert [line.split(b" ", 3)[1:] for line in lines[-1:]] == [[b"stdout", b"P", b"rest"]]
    assert len(list(tmp_path.iterdir())) > 2
    whole = b"".join(sent)
    assert b"".join(await log.read_all("stdout", len(whole))) == whole


async def test_a_short_write_is_finished(make_log, tmp_path, monkeypatch):
    path = tmp_path / "c.log"
    log = make_log(path)
    writev = log_writer.os.writev

    def short(fd, pieces):
        monkeypatch.setattr(log_writer.os, "writev", writev)
        return log_writer.os.write(fd, pieces[0])

    monkeypatch.setattr(log_writer.os, "writev", short)
    await log.write(b"one\ntwo\n")
    assert entries(path) == ["one\n", "two\n"]


async def test_small_writes_that_wait_are_written_together(make_log, tmp_path, monkeypatch):
    log = make_log(tmp_path / "c.log")
    calls = []
    writev = log_writer.os.writev
    monkeypatch.setattr(
        log_writer.os, "writev", lambda fd, pieces: calls.append(1) or writev(fd, pieces)
    )
    with log.writer.file_lock:  # the thread comes as far as the index of the first write
        for number in range(200):
            log.writer.write("stdout" if number < 190 else "stderr", b"%d\n" % number)
    await log.writer.settle()
    assert len(calls) < 20
    assert entries(tmp_path / "c.log") == [f"{number}\n" for number in range(200)]


async def test_file_that_cannot_be_opened_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FailedPrecondition, match="cannot be opened"):
        LogWriter(tmp_path / "file" / "c.log", JsonFileFormat())


async def test_raw_form_writes_the_bytes(make_log, tmp_path):
    path = tmp_path / "raw"
    path.write_bytes(b"before ")
    log = make_log(path, RawFormat())
    await log.write(b"\xff\0")
    await log.write(b"more")
    assert path.read_bytes() == b"before \xff\0more"


def test_index_thins_out_and_still_finds():
    index = StreamIndex()
    for number in range(3 * log_index.PLACES_MAX):
        offset = number * log_index.INDEX_DISTANCE_BYTES
        index.add(Place(offset, 0, number * 10, lossy=False))
        index.written = offset + log_index.INDEX_DISTANCE_BYTES
    assert len(index.places) <= log_index.PLACES_MAX
    for offset in (0, 12345678, index.written - 1):
        place, end = index.find(offset)
        assert place.offset <= offset < end
        assert place.position * log_index.INDEX_DISTANCE_BYTES == place.offset * 10
