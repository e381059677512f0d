"""The document that one image of a shim leaves to the next."""

from __future__ import annotations

import json
import os

import pytest

from services.common.errors import FailedPrecondition
from services.shim import handover
from services.shim.handover import Outgoing, Skeleton, named, renamed
from services.shim.stdio import meter
from services.shim.stdio.formats import JsonFileFormat
from services.shim.stdio.log_writer import LogWriter
from services.shim.stdio.meter import Meter
from services.shim.stdio.output import Gap, Output


def test_document_comes_back_as_it_was():
    out = Outgoing()
    data = bytes(range(256)) * 9000
    fd = handover.write({"data": out.data(data), "fd": out.fd(7), "none": out.fd(-1)})
    try:
        document = handover.read(fd)
        assert handover.data_of(document["data"]) == data
        assert (document["fd"], document["none"], out.fds) == (7, -1, [7])
        assert handover.read(fd) == document  # a second image can read it again
    finally:
        os.close(fd)


@pytest.mark.parametrize("content", [b"", b"[]", b'{"format": 999}', b"garbage"])
def test_what_is_no_document_is_refused(content):
    fd = os.memfd_create("test")
    os.write(fd, content)
    try:
        with pytest.raises(FailedPrecondition, match=r"no document|has format 999"):
            handover.read(fd)
    finally:
        os.close(fd)


def test_descriptors_are_inherited_only_while_they_are_to_be():
    read, write = os.pipe2(os.O_CLOEXEC)
    handover.keep_over_exec([read, write, 9999], keep=True)
    assert os.get_inheritable(read)
    handover.keep_over_exec([read, write, 9999], keep=False)
    assert not os.get_inheritable(write)
    os.close(read)
    os.close(write)


def test_descriptors_are_renamed_wherever_they_are():
    document = {"fd": 5, "sinks": [{"fd": 6, "streams": 5}], "pumps": ({"fd": -1},), "meter": 8}
    assert named(document) == {5, 6, -1, 8}
    there = renamed(document, {5: "a", 6: "b"})
    assert there == {
        "fd": "a",
        "sinks": [{"fd": "b", "streams": 5}],
        "pumps": [{"fd": -1}],
        "meter": -1,
    }
    assert renamed(there, {"a": 15, "b": 16})["sinks"] == [{"fd": 16, "streams": 5}]


async def test_output_and_log_go_on_in_another_image(tmp_path):
    path = tmp_path / "c.log"
    log = LogWriter(path, JsonFileFormat(), max_size_bytes=4000, max_files=9)
    output = Output(log, streams=2)
    for number in range(100):
        output.write("stdout", b"line %d\n" % number)
        output.write("stderr", b"err %d\n" % number)
    output.write("stdout", b"unfinished")
    await output.settle()
    out = Outgoing()
    saved = json.loads(json.dumps(output.pack(out)))
    successor = LogWriter(
        path, JsonFileFormat(), max_size_bytes=4000, max_files=9, saved=saved["log"]
    )
    again = Output.unpack(saved, successor)
    again.write("stdout", b" line\n")
    again.finish("stdout")
    again.finish("stderr")
    reader = again.attach(0, from_end=False, follow=True)
    found = {"stdout": b"", "stderr": b""}
    while (piece := await reader.read()) is not None:
        assert not isinstance(piece, Gap)
        found[piece.stream] += piece.data
        reader.advance(piece)
    await again.close()
    lines = b"".join(b"line %d\n" % number for number in range(100))
    assert found["stdout"] == lines + b"unfinished line\n"
    newest = json.loads(path.read_text().splitlines()[-1])
    assert newest["log"] == "unfinished line\n"


async def test_log_torn_by_a_kill_is_mended_when_it_is_opened_again(tmp_path):
    path = tmp_path / "c.log"
    log = LogWriter(path, JsonFileFormat())
    log.write("stdout", b"whole\n")
    await log.settle()
    saved = json.loads(json.dumps(log.pack(Skeleton())))
    await log.close()
    with path.open("ab") as file:
        file.write(b'{"log":"torn' + b"x" * 200_000)
    again = LogWriter(path, JsonFileFormat(), saved=saved)
    again.write("stdout", b"next\n")
    await again.settle()
    await again.close()
    assert [json.loads(line)["log"] for line in path.read_text().splitlines()] == [
        "whole\n",
        "next\n",
    ]


def test_meter_is_read_by_who_comes_after():
    first = Meter()
    first[meter.READ["stderr"]] = 1 << 40
    second = Meter(os.dup(first.fd))
    assert second[meter.READ["stderr"]] == 1 << 40
    assert second[meter.READ["stdout"]] == 0
    for each in (first, second):
        each.close()
        os.close(each.fd)
