"""Reading json-file logs: order, tails, rotation, damage."""

from __future__ import annotations

import json

import pytest

from services.daemon.containers.logfile import LogCursor
from services.daemon.containers.runtime import StreamKind

BOTH = frozenset(StreamKind)


def line(text, *, stream="stdout", time="2024-01-02T03:04:05.000000001Z"):
    return json.dumps({"log": text, "stream": stream, "time": time}) + "\n"


def write(path, *lines):
    with path.open("a") as file:
        file.writelines(lines)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "x-json.log"


@pytest.fixture
def cursor(path):
    made = LogCursor(path)
    yield made
    made.close()


def drain(cursor):
    texts = []
    while entries := cursor.read():
        texts += [entry.data.decode() for entry in entries]
    return texts


def test_entries_carry_time_stream_and_bytes(path, cursor):
    write(
        path,
        line("a\x00\u00e9\n", stream="stderr"),
        line("b\n", time="2024-01-02T03:04:05.5Z"),
        line("c\n", time="2024-01-02T03:04:06Z"),
    )
    entries = cursor.read()
    assert entries[0].stream is StreamKind.STDERR
    assert entries[0].data == "a\x00é\n".encode()
    assert [entry.timestamp_ns for entry in entries] == [
        1704164645_000000001,
        1704164645_500000000,
        1704164646_000000000,
    ]


def test_no_file_yet_is_an_empty_log(path, cursor):
    cursor.to_start()
    assert cursor.read() == []
    write(path, line("later\n"))
    assert drain(cursor) == ["later\n"]


def test_an_unfinished_line_waits_for_its_end(path, cursor):
    whole = line("whole\n")
    path.write_text(whole[:10])
    assert cursor.read() == []
    with path.open("a") as file:
        file.write(whole[10:])
    assert drain(cursor) == ["whole\n"]


def test_damaged_lines_are_passed_over(path, cursor):
    write(path, line("one\n"), "garbage\n", '{"log": 1}\n', "\n", "[]\n", line("two\n"))
    assert drain(cursor) == ["one\n", "two\n"]


def test_rotated_files_are_read_oldest_first(path, cursor):
    write(path.with_name(f"{path.name}.2"), line("1\n"))
    write(path.with_name(f"{path.name}.1"), line("2\n"))
    write(path, line("3\n"))
    cursor.to_start()
    assert drain(cursor) == ["1\n", "2\n", "3\n"]


def test_a_reader_finds_its_way_through_a_rotation(path, cursor):
    write(path, line("1\n"))
    assert drain(cursor) == ["1\n"]
    write(path, line("2\n"))
    path.rename(path.with_name(f"{path.name}.1"))
    write(path, line("3\n"))
    assert drain(cursor) == ["2\n", "3\n"]
    # Twice at once, and then so often that its file is gone.
    for text in ("4\n", "5\n"):
        path.with_name(f"{path.name}.1").rename(path.with_name(f"{path.name}.2"))
        path.rename(path.with_name(f"{path.name}.1"))
        write(path, line(text))
    assert drain(cursor) == ["4\n", "5\n"]
    path.unlink()
    path.with_name(f"{path.name}.1").unlink()
    path.with_name(f"{path.name}.2").unlink()
    assert drain(cursor) == []
    write(path, line("6\n"))
    assert drain(cursor) == ["6\n"]


@pytest.mark.parametrize("count", [0, 1, 2, 5, 100, 1000, 5000])
def test_a_tail_has_so_many_lines(path, cursor, count):
    lines = [f"line {number} {'x' * (number % 200)}\n" for number in range(3000)]
    write(path.with_name(f"{path.name}.1"), *(line(text) for text in lines[:1000]))
    write(path, *(line(text) for text in lines[1000:]))
    cursor.to_tail(count, BOTH)
    assert drain(cursor) == (lines[-count:] if count else [])


def test_a_tail_counts_lines_of_the_streams_wanted(path, cursor):
    write(path, line("o1\n"), line("e1\n", stream="stderr"), line("o2\n"), line("o3\n"))
    cursor.to_tail(2, frozenset({StreamKind.STDERR}))
    assert drain(cursor) == ["o1\n", "e1\n", "o2\n", "o3\n"]
    cursor.to_tail(1, frozenset({StreamKind.STDERR}))
    assert drain(cursor)[0] in ("o1\n", "e1\n")


def test_parts_of_a_long_line_are_one_line(path, cursor):
    write(path, line("first\n"), line("part "), line("part "), line("end\n"), line("unfinished"))
    cursor.to_tail(2, BOTH)
    assert drain(cursor) == ["part ", "part ", "end\n", "unfinished"]
    cursor.to_tail(1, BOTH)
    assert drain(cursor) == ["unfinished"]


def test_a_tail_ignores_a_line_that_is_being_written(path, cursor):
    write(path, line("one\n"), line("two\n"), line("three\n")[:5])
    cursor.to_tail(1, BOTH)
    assert drain(cursor) == ["two\n"]
