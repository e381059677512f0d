"""Bundles: complete or absent, safe names, sockets that fit, removal that can be repeated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from services.common import linux
from services.common.errors import AlreadyExists, InvalidArgument, NotFound
from services.containerd.tasks.bundle import Bundles
from services.containerd.tasks.processes import ProcessId


@pytest.fixture
def bundles(tmp_path: Path) -> Bundles:
    return Bundles(tmp_path)


def test_a_new_bundle_is_complete(bundles: Bundles, tmp_path: Path) -> None:
    record = bundles.create("ns", "c1", b'{"ociVersion": "1.0.2"}')
    bundle = bundles.find("ns", "c1")
    assert bundle.path == tmp_path / "tasks" / "ns" / "c1"
    assert bundle.record() == record
    assert (record.namespace, record.id, record.pid) == ("ns", "c1", 0)
    assert len(record.instance_id) == 32
    assert record.boot_id == linux.boot_id()
    assert record.socket == str(bundles.socket("ns", "c1", record.instance_id))
    assert (bundle.path / "config.json").read_bytes() == b'{"ociVersion": "1.0.2"}'
    assert (bundle.path / "rootfs").is_dir()
    assert bundle.path.stat().st_mode & 0o777 == 0o700
    assert bundle.process() is None
    assert [found.id for found in bundles.all()] == ["c1"]


def test_a_bundle_cannot_be_made_twice(bundles: Bundles) -> None:
    first = bundles.create("ns", "c1", b"{}")
    with pytest.raises(AlreadyExists):
        bundles.create("ns", "c1", b"{}")
    assert bundles.find("ns", "c1").record() == first
    assert bundles.create("other", "c1", b"{}").instance_id != first.instance_id
    assert len(bundles.all()) == 2


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../x", "a" * 77, ".hidden", "a\0b"])
def test_names_that_are_no_path_component_are_refused(bundles: Bundles, name: str) -> None:
    with pytest.raises(InvalidArgument):
        bundles.find("ns", name)
    with pytest.raises(InvalidArgument):
        bundles.find(name, "c1")


@pytest.mark.parametrize("spec", [b"", b"{", b"[]", b"\xff"])
def test_a_spec_that_is_no_object_is_refused(bundles: Bundles, spec: bytes) -> None:
    with pytest.raises(InvalidArgument):
        bundles.create("ns", "c1", spec)
    assert bundles.all() == []


def test_a_state_directory_too_deep_for_a_socket_is_refused(tmp_path: Path) -> None:
    deep = Bundles(tmp_path / ("d" * 100))
    with pytest.raises(InvalidArgument, match="shorter state directory"):
        deep.create("ns", "c1", b"{}")
    assert deep.all() == []


def test_root_of_a_user_namespace_may_pass_through(bundles: Bundles) -> None:
    mappings = [{"containerID": 0, "hostID": 12345, "size": 1}]
    spec = json.dumps({"linux": {"gidMappings": mappings}}).encode()
    bundles.create("ns", "c1", spec)
    status = bundles.find("ns", "c1").path.stat()
    assert (status.st_gid, status.st_mode & 0o777) == (12345, 0o710)


def test_removal_can_be_repeated(bundles: Bundles) -> None:
    record = bundles.create("ns", "c1", b"{}")
    socket = Path(record.socket)
    socket.touch()
    bundle = bundles.find("ns", "c1")
    assert bundle.deletion() is None
    bundle.begin_deletion({"exit_status": 3})
    assert bundle.deletion() == {"exit_status": 3}
    bundle.remove()
    bundle.remove()
    assert not socket.exists()
    assert list(bundle.path.parent.iterdir()) == []


def test_rubbish_of_interrupted_steps_is_cleared_away(bundles: Bundles) -> None:
    bundles.create("ns", "c1", b"{}")
    rubbish = bundles.find("ns", "c1").path.with_name(".c2.0a0b")
    (rubbish / "rootfs").mkdir(parents=True)
    assert [found.id for found in bundles.all()] == ["c1"]
    assert not rubbish.exists()


def test_a_record_that_is_broken_is_none(bundles: Bundles) -> None:
    bundles.create("ns", "c1", b"{}")
    bundle = bundles.find("ns", "c1")
    for text in ("", "[]", '{"id": "c1"}', '{"instance_id": 1, "pid": "x"}'):
        (bundle.path / "shim.json").write_text(text)
        with pytest.raises(NotFound):
            bundle.record()
        assert bundle.process() is None


def test_the_process_of_another_boot_is_nobody(bundles: Bundles) -> None:
    record = bundles.create("ns", "c1", b"{}")
    bundle = bundles.find("ns", "c1")
    data = bundle.read_json("shim.json") | {"pid": 5, "start_time": 6}
    bundle.write_json("shim.json", data)
    assert bundle.process() == ProcessId(5, 6)
    bundle.write_json("shim.json", data | {"boot_id": "another"})
    assert bundle.process() is None
    assert bundle.record().instance_id == record.instance_id
