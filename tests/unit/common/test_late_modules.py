"""Modules that are loaded when they are first used."""

import importlib
import subprocess
import sys

import pytest

from services.common.late_modules import load_late

WORKS = """
import sys
from services.common.late_modules import PROTOBUF_IN_PYTHON, load_late

load_late(PROTOBUF_IN_PYTHON)
from google.protobuf import text_format
from google.protobuf.internal import api_implementation
from protos.theseus.journal.v1 import journal_pb2 as pb

message = pb.ReadResponse(next_seq=7, entry=pb.Entry(topic="/a", seq=6))
message.entry.timestamp.FromNanoseconds(5)
again = pb.ReadResponse.FromString(message.SerializeToString())
assert again == message, again
assert text_format.Parse(str(message), pb.ReadResponse()) == message
late = type(sys.modules[PROTOBUF_IN_PYTHON]).__name__
assert (late == "_Late") == (api_implementation.Type() == "upb"), late
assert sys.modules[PROTOBUF_IN_PYTHON].GeneratedProtocolMessageType
assert type(sys.modules[PROTOBUF_IN_PYTHON]).__name__ == "module"
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module that tells when it is loaded."""
    (tmp_path / "told_late.py").write_text("import sys\nsys.told_late = True\nANSWER = 42\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "told_late", False, raising=False)
    yield "told_late"
    sys.modules.pop("told_late", None)


def test_a_module_is_loaded_with_its_first_use(module):
    load_late(module)
    imported = importlib.import_module(module)
    assert not sys.told_late
    assert imported.ANSWER == 42
    assert sys.told_late


def test_one_that_is_loaded_stays(module):
    imported = importlib.import_module(module)
    load_late(module)
    assert sys.modules[module] is imported


@pytest.mark.parametrize("name", ["no_such_module", "no_such_package.module", "json.no_such"])
def test_one_that_is_not_there_is_not_made(name):
    load_late(name)
    assert name not in sys.modules
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(name)


def test_protobuf_works_without_its_implementation_in_python():
    done = subprocess.run(
        [sys.executable, "-c", WORKS], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 0, done.stderr
