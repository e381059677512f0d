from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.shim.stdio import cri, json_file
from services.shim.stdio.formats import JsonFileFormat, format_time
from services.shim.stdio.json_file import look, parse_line
from services.shim.stdio.lines import LINE_MAX_BYTES, LineSplitter, Run, nth_newline_end

TIME = "2026-01-02T03:04:05.6Z"


def go_escape(raw: bytes) -> str:
    """What docker's encoder writes, byte by byte: the model for the bulk code."""
    out, position = "", 0
    special = {ord('"'): '\\"', ord("\\"): "\\\\", 10: "\\n", 13: "\\r"}
    while position < len(raw):
        byte = raw[position]
        if byte < 0x80:
            if byte in special:
                out += special[byte]
            elif byte < 0x20 or chr(byte) in "<>&":
                out += f"\\u{byte:04x}"
            else:
                out += chr(byte)
            position += 1
            continue
        for length in (2, 3, 4):
            try:
                character = raw[position : position + length].decode()
            except UnicodeDecodeError:
                continue
            out += {"\u2028": "\\u2028", "\u2029": "\\u2029"}.get(character, character)
            position += length
            break
        else:
            out += "\\ufffd"
            position += 1
    return out


def format_run(run: Run, stream: str, timestamp: str):
    return json_file.format_run(run, stream, timestamp, look(run.raw))


def lines_of(stream: bytes, pieces: list[int]):
    """All log lines that a stream gives when it is read in pieces of these sizes."""
    splitter, runs, position = LineSplitter(), [], 0
    for size in pieces:
        runs += splitter.feed(stream[position : position + size])
        position += size
    runs += splitter.feed(stream[position:])
    runs += splitter.finish()
    return runs, b"".join(format_run(run, "stdout", TIME).data for run in runs)


def test_line_is_dockers_byte_for_byte():
    formatted = format_run(Run(b'say "hi"\t<&>\\\x01\n', whole=True), "stderr", TIME)
    assert formatted.data == (
        b'{"log":"say \\"hi\\"\\u0009\\u003c\\u0026\\u003e\\\\\\u0001\\n",'
        b'"stream":"stderr","time":"2026-01-02T03:04:05.6Z"}\n'
    )
    assert not formatted.lossy


@settings(deadline=None, max_examples=60)
@given(
    raw=st.lists(
        st.one_of(
            st.binary(max_size=8), st.sampled_from([b"\n", b"\xe2\x80\xa8", "é€😀".encode()])
        ),
        max_size=20,
    ).map(b"".join)
)
def test_escaping_is_what_go_does(raw):
    formatted = format_run(Run(raw, whole=False), "stdout", TIME)
    text = go_escape(raw)
    assert formatted.data.decode() == f'{{"log":"{text}","stream":"stdout","time":"{TIME}"}}\n'
    back = json.loads(formatted.data)["log"].encode()
    assert (back == raw) or formatted.lossy


@settings(deadline=None, max_examples=60)
@given(
    lines=st.lists(
        st.tuples(
            st.sampled_from(["a", "é", "😀", '"', "\0"]),
            st.one_of(st.integers(0, 50), st.sampled_from([4095, 8192, 16383, 16384, 40000])),
        ),
        max_size=12,
    ),
    pieces=st.lists(st.integers(1, 30000), max_size=10),
    unfinished=st.booleans(),
)
def test_stream_comes_out_whole_however_it_was_cut(lines, pieces, unfinished):
    stream = b"".join((text * count).encode() + b"\n" for text, count in lines)
    if unfinished:
        stream = stream[:-1]
    runs, data = lines_of(stream, pieces)
    parsed = [parse_line(line) for line in data.splitlines(keepends=True)]
    assert all(entry is not None and entry[0] == "stdout" for entry in parsed)
    assert b"".join(entry[1] for entry in parsed) == stream
    assert all(len(entry[1]) <= LINE_MAX_BYTES for entry in parsed)
    # A newline only ever ends an entry.
    assert all(b"\n" not in entry[1][:-1] for entry in parsed)
    assert not any(format_run(run, "stdout", TIME).lossy for run in runs)


@settings(deadline=None, max_examples=80)
@given(
    stream=st.lists(
        st.one_of(
            st.binary(max_size=30),
            st.sampled_from([b"\n", b"\n" * 5, b"x" * 16384, b'"<&' * 6000, "ü😀".encode() * 5000]),
        ),
        max_size=15,
    ).map(b"".join),
    pieces=st.lists(st.integers(1, 40000), max_size=10),
)
def test_a_format_fed_in_pieces_writes_what_a_slow_one_does(stream, pieces):
    form = JsonFileFormat()
    chunks, position = [], 0
    for size in [*pieces, len(stream)]:
        chunks += form.feed("stdout", stream[position : position + size], 0)
        position += size
    chunks += form.finish("stdout", 0)
    head, tail = '{"log":"', '","stream":"stdout","time":"1970-01-01T00:00:00Z"}\n'
    expected = ""
    for chunk in chunks:
        lines = [chunk.raw]
        if chunk.lines:
            lines = [line + b"\n" for line in chunk.raw.split(b"\n")[:-1]]
        expected += "".join(head + go_escape(line) + tail for line in lines)
    assert b"".join(chunk.data for chunk in chunks).decode() == expected
    assert b"".join(chunk.raw for chunk in chunks) == stream
    counted = sum(chunk.newlines for chunk in chunks)
    assert counted == stream.count(b"\n")


def test_long_line_is_cut_like_dockers():
    runs, _ = lines_of(b"x" * 16384 + b"\n" + b"y" * 16383 + b"\n", [])
    assert [run.raw for run in runs] == [b"x" * 16384, b"\n" + b"y" * 16383 + b"\n"]


def test_bytes_that_are_no_text_are_cut_at_the_limit():
    runs, _ = lines_of(b"\xbf" * 20000, [])
    assert [len(run.raw) for run in runs] == [16384, 3616]


@pytest.mark.parametrize(
    ("time_ns", "text"),
    [
        (0, "1970-01-01T00:00:00Z"),
        (1_500_000_000, "1970-01-01T00:00:01.5Z"),
        (1_000_000_001, "1970-01-01T00:00:01.000000001Z"),
    ],
)
def test_time_has_no_trailing_zeros(time_ns, text):
    assert format_time(time_ns) == text


@pytest.mark.parametrize("line", [b"", b"{", b"[]", b"{}", b'{"stream":"stdout","log":7}\n'])
def test_what_is_no_log_line_is_none(line):
    assert parse_line(line) is None


@settings(deadline=None, max_examples=60)
@given(st.binary(max_size=200).map(lambda data: data.replace(b"\0", b"\n") + b"\n"))
def test_nth_newline(data):
    for count in range(1, data.count(b"\n") + 1):
        end = nth_newline_end(data, count)
        assert data[:end].count(b"\n") == count
        assert data[end - 1] == 10


@settings(deadline=None, max_examples=60)
@given(
    lines=st.lists(
        st.one_of(
            st.binary(max_size=40).map(lambda data: data.replace(b"\n", b"\0")),
            st.sampled_from([b"x" * 16383, b"x" * 16384, "é€".encode() * 9000, b"\xff" * 40000]),
        ),
        max_size=12,
    ),
    pieces=st.lists(st.integers(1, 30000), max_size=10),
    unfinished=st.booleans(),
)
def test_cri_lines_are_what_a_line_by_line_writer_makes(lines, pieces, unfinished):
    stream = b"".join(line + b"\n" for line in lines)
    if unfinished:
        stream = stream[:-1]
    runs, _ = lines_of(stream, pieces)
    written = b"".join(cri.format_run(run, "stderr", TIME, frozenset()).data for run in runs)
    expected = b""
    for run in runs:
        for text in run.raw.split(b"\n")[: -1 if run.whole else None]:
            tag = b"F" if run.whole else b"P"
            expected += TIME.encode() + b" stderr " + tag + b" " + text + b"\n"
    assert written == expected
    parsed = [cri.parse_line(line + b"\n") for line in written.split(b"\n")[:-1]]
    assert all(entry is not None and entry[0] == "stderr" for entry in parsed)
    assert b"".join(entry[1] for entry in parsed) == stream
    assert all(len(entry[1]) <= LINE_MAX_BYTES for entry in parsed)


@pytest.mark.parametrize(
    "line", [b"", b"x\n", b"t stdout X a\n", b"t stdin F a\n", b"t stdout F\n"]
)
def test_what_is_no_cri_line_is_none(line):
    assert cri.parse_line(line) is None
