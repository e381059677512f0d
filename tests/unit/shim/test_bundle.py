from __future__ import annotations

import pytest

from services.common.errors import FailedPrecondition
from services.shim.bundle import Bundle, has_own_pid_namespace


def test_file_is_replaced_whole_and_read_back(tmp_path):
    bundle = Bundle(tmp_path)
    bundle.write("state.json", {"a": 1})
    bundle.write("state.json", {"a": 2})
    assert bundle.read("state.json") == {"a": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]


@pytest.mark.parametrize("content", ["", "{", "[1]", "\0"])
def test_broken_or_missing_file_reads_as_empty(tmp_path, content):
    (tmp_path / "state.json").write_text(content)
    assert Bundle(tmp_path).read("state.json") == {}
    assert Bundle(tmp_path).read("other.json") == {}


def test_spec_is_required(tmp_path):
    with pytest.raises(FailedPrecondition, match="no readable"):
        Bundle(tmp_path).read_spec()
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(FailedPrecondition, match="not valid JSON"):
        Bundle(tmp_path).read_spec()
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(FailedPrecondition, match="not a JSON object"):
        Bundle(tmp_path).read_spec()


@pytest.mark.parametrize(
    ("linux", "own"),
    [
        ({"namespaces": [{"type": "pid"}]}, True),
        ({"namespaces": [{"type": "pid", "path": "/proc/1/ns/pid"}]}, False),
        ({"namespaces": [{"type": "mount"}]}, False),
        ({"namespaces": None}, False),
        (None, False),
    ],
)
def test_own_pid_namespace(linux, own):
    assert has_own_pid_namespace({"linux": linux}) is own
