"""What option values mean."""

import os
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.cli import values
from services.cli.parser import UsageError


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("1024", 1024),
        ("64m", 64 << 20),
        ("64M", 64 << 20),
        ("64mb", 64 << 20),
        ("64MiB", 64 << 20),
        ("1.5g", 3 << 29),
        ("2k", 2048),
        ("7b", 7),
        ("-1", 0),
    ],
)
def test_sizes(text, count):
    assert values.size(text) == count


@pytest.mark.parametrize("text", ["", "m", "64x", "-2", "1 2", "0x10", "1..2m", "٣m\n"])
def test_what_is_no_size(text):
    with pytest.raises(UsageError, match="is not a size"):
        values.size(text)


@pytest.mark.parametrize(
    ("text", "mappings"),
    [
        ("80", [("", 0, 80, "")]),
        ("80/udp", [("", 0, 80, "udp")]),
        ("8080:80", [("", 8080, 80, "")]),
        ("127.0.0.1:8080:80/TCP", [("127.0.0.1", 8080, 80, "tcp")]),
        ("127.0.0.1::80", [("127.0.0.1", 0, 80, "")]),
        ("[::1]:8080:80", [("::1", 8080, 80, "")]),
        ("7000-7001:80-81", [("", 7000, 80, ""), ("", 7001, 81, "")]),
        ("80-81", [("", 0, 80, ""), ("", 0, 81, "")]),
    ],
)
def test_ports(text, mappings):
    found = [(p.host_ip, p.host_port, p.container_port, p.protocol) for p in values.ports(text)]
    assert found == mappings


@pytest.mark.parametrize(
    "text",
    ["", "x", "80:", ":", "1:2:3:4", "70000:80", "80-70", "1-2:3", "80/", "-1:80", "::1:80:80"],
)
def test_what_is_no_port(text):
    with pytest.raises(UsageError):
        values.ports(text)


@given(st.text())
def test_any_text_is_ports_or_an_error(text):
    try:
        for mapping in values.ports(text):
            assert 0 <= mapping.host_port <= 65535
            assert 0 <= mapping.container_port <= 65535
    except UsageError:
        pass


def test_volumes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bind = values.volume("./data:/d:ro,rshared,z")
    assert (bind.type, bind.source) == (bind.TYPE_BIND, str(tmp_path / "data"))
    assert bind.read_only and bind.create_source
    assert list(bind.options) == ["rshared"]
    named = values.volume("name:/d")
    assert (named.type, named.source, named.target) == (named.TYPE_VOLUME, "name", "/d")
    assert not named.create_source and not named.read_only
    with pytest.raises(UsageError, match="is not a volume"):
        values.volume("a:b:c:d")


@pytest.mark.parametrize(
    "text", ["type=odd,dst=/a", "type=bind,src=/a", "dst=/a,wat", "readonly=maybe"]
)
def test_what_is_no_mount(text):
    with pytest.raises(UsageError):
        values.mount(text)


def test_mounts():
    bind = values.mount("type=bind,source=/a,destination=/b,bind-propagation=rslave,ro")
    assert (bind.type, bind.source, bind.target) == (bind.TYPE_BIND, "/a", "/b")
    assert bind.read_only and not bind.create_source
    assert list(bind.options) == ["rslave"]
    assert list(values.mount("type=tmpfs,dst=/t,tmpfs-size=1m").options) == ["size=1m"]
    assert values.mount("dst=/v").type == bind.TYPE_VOLUME


@pytest.mark.parametrize(
    ("text", "length"), [("10", "10"), ("1.5", "1.5"), ("1h30m", "5400"), ("500ms", "0.5")]
)
def test_durations(text, length):
    assert values.seconds(text) == Decimal(length)


@pytest.mark.parametrize("text", ["", "x", "10 s", "-1s", "1h30"])
def test_what_is_no_duration(text):
    with pytest.raises(UsageError):
        values.seconds(text)


def test_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("OURS", "value")
    monkeypatch.delenv("NOT_OURS", raising=False)
    file = tmp_path / "env"
    file.write_text("#no\n  A=b # kept\n\nOURS\nNOT_OURS\nEMPTY=\n")
    assert values.environment(["OURS", "NOT_OURS", "X="], [str(file)]) == [
        "A=b # kept",
        "OURS=value",
        "EMPTY=",
        "OURS=value",
        "NOT_OURS",
        "X=",
    ]
    assert "NOT_OURS" not in os.environ


@pytest.mark.parametrize("content", [b"=x\n", b"two words=x\n", b"\xff\xfe\n"])
def test_environment_files_that_make_no_sense(tmp_path, content):
    (tmp_path / "env").write_bytes(content)
    with pytest.raises(UsageError):
        values.environment([], [str(tmp_path / "env")])


def test_cpus():
    assert values.nano_cpus("0.5") == 500_000_000
    assert values.nano_cpus("-1") == -1_000_000_000  # the engine says what is wrong with it
    for text in ("x", "", "nan", "inf"):
        with pytest.raises(UsageError):
            values.nano_cpus(text)
