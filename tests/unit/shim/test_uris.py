from __future__ import annotations

from pathlib import Path

import pytest

from services.common.errors import InvalidArgument
from services.shim.stdio import uris


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("", uris.Nothing()),
        ("/dev/null", uris.Nothing()),
        ("/run/fifo", uris.Fifo(Path("/run/fifo"))),
        ("theseus-stream:", uris.Attachable()),
        ("file:///a%20b", uris.RawFile(Path("/a b"))),
        ("binary:///l?a=1&b=", uris.Logger(Path("/l"), ("a", "1", "b"))),
        ("theseus-log:///c.log", uris.LogFile(Path("/c.log"))),
        (
            "theseus-log:///c.log?format=json-file&max-size=10&max-file=3&on-full=block",
            uris.LogFile(Path("/c.log"), 10, 3, block_on_full=True),
        ),
        ("theseus-log:///c.log?max-file=0&max-size=", uris.LogFile(Path("/c.log"), 0, 1)),
    ],
)
def test_output_uri_is_parsed(uri, expected):
    assert uris.parse_output(uri, field="stdout") == expected


@pytest.mark.parametrize(
    "uri",
    [
        "http://host/x",
        "relative",
        "file://relative",
        "file://host/x",
        "theseus-log:///x?format=xml",
        "theseus-log:///x?max-size=-1",
        "theseus-log:///x?max-size=1e3",
        "theseus-log:///x?max-size=" + "9" * 30,
        "theseus-log:///x?surprise=1",
        "theseus-log:///x?on-full=cry",
        "/a\0b",
    ],
)
def test_bad_uri_names_its_field(uri):
    with pytest.raises(InvalidArgument) as caught:
        uris.parse_output(uri, field="stderr")
    assert caught.value.field == "stderr"


def test_input_comes_from_fifo_or_clients_only():
    assert uris.parse_input("theseus-stream:") == uris.Attachable()
    assert uris.parse_input("/f") == uris.Fifo(Path("/f"))
    for uri in ("file:///x", "binary:///x", "theseus-log:///x"):
        with pytest.raises(InvalidArgument):
            uris.parse_input(uri)
