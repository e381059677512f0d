"""Manifests and configurations."""

from __future__ import annotations

import hashlib
import json

import pytest

from services.common.errors import DataLoss
from services.daemon.images import manifest
from services.daemon.images.node import Platform, TransferProgress
from services.daemon.images.progress import PullProgress

A, B = "sha256:" + "a" * 64, "sha256:" + "b" * 64


def test_chain_ids_are_those_of_the_specification():
    assert manifest.chain_ids([]) == ()
    assert manifest.chain_ids([A]) == (A,)
    joined = hashlib.sha256(f"{A} {B}".encode()).hexdigest()
    assert manifest.chain_ids([A, B]) == (A, f"sha256:{joined}")


@pytest.mark.parametrize(
    ("entry", "fits"),
    [
        ({"os": "linux", "architecture": "arm", "variant": "v7"}, True),
        ({"os": "linux", "architecture": "arm", "variant": "v6"}, True),
        ({"os": "linux", "architecture": "arm"}, True),
        ({"os": "linux", "architecture": "arm", "variant": "v8"}, False),
        ({"os": "linux", "architecture": "amd64"}, False),
        ({"os": "windows", "architecture": "arm", "variant": "v7"}, False),
        ({}, True),
    ],
)
def test_platforms_fit_when_the_machine_can_run_them(entry, fits):
    index = {"manifests": [{"digest": A, "size": 1, "platform": entry}]}
    found = manifest.choose(index, Platform("linux", "arm", "v7"), "index")
    assert bool(found) is fits


def test_the_best_platform_comes_first():
    entries = [
        {"digest": A, "platform": {"os": "linux", "architecture": "arm", "variant": "v6"}},
        {"digest": B, "platform": {"os": "linux", "architecture": "arm", "variant": "v7"}},
    ]
    found = manifest.choose({"manifests": entries}, Platform("linux", "arm", "v7"), "index")
    assert [entry.digest for entry in found] == [B, A]


def test_a_configuration_is_read_as_far_as_running_needs_it():
    document = {
        "os": "linux",
        "architecture": "arm64",
        "variant": "v8",
        "created": "2024-01-02T03:04:05.123456789+01:00",
        "config": {
            "Env": ["A=1"],
            "Cmd": ["sh"],
            "Entrypoint": None,
            "User": "bob",
            "WorkingDir": "/w",
            "ExposedPorts": {"80/tcp": {}},
            "Volumes": {"/b": {}, "/a": {}},
            "Labels": {"k": "v"},
            "StopSignal": "SIGINT",
        },
        "rootfs": {"diff_ids": [A]},
    }
    found = manifest.parse_config(json.dumps(document).encode(), "configuration")
    assert str(found.platform) == "linux/arm64/v8"
    assert found.created_at_ns == 1704161045_123456789
    assert found.diff_ids == (A,)
    assert found.run.volumes == ("/a", "/b")
    assert (found.run.command, found.run.entrypoint) == (("sh",), ())
    assert (found.run.user, found.run.stop_signal) == ("bob", "SIGINT")


@pytest.mark.parametrize(
    "created", ["", "yesterday", "2024-13-01T00:00:00Z", "0000-00-00T00:00:00Z"]
)
def test_a_time_that_is_none_is_no_time(created):
    data = json.dumps({"created": created}).encode()
    assert manifest.parse_config(data, "configuration").created_at_ns == 0


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"{", b'{"config": 1}', b'{"config": {}, "layers": 1}', b'{"layers": []}']
)
def test_what_is_no_manifest_is_data_loss(data):
    with pytest.raises(DataLoss):
        manifest.parse_manifest(manifest.parse_document(data, "manifest"), "manifest")


@pytest.mark.parametrize(
    ("text", "platform"),
    [
        ("linux/amd64", Platform("linux", "amd64")),
        ("linux/arm/v7", Platform("linux", "arm", "v7")),
        ("linux", None),
        ("linux/", None),
        ("linux/a/b/c", None),
        ("LINUX/amd64", None),
    ],
)
def test_platforms_as_users_write_them(text, platform):
    assert manifest.parse_platform(text) == platform


def test_a_layer_never_goes_back_in_the_progress():
    progress = PullProgress()
    for event, done in (("downloading", 5), ("complete", 10), ("downloading", 6), ("saved", 0)):
        progress.update(TransferProgress(event, digest=A, media_type="x.layer", current_bytes=done))
    progress.update(TransferProgress("downloading", digest=B, media_type="x.manifest"))
    (layer,) = progress.report()
    assert (layer.status, layer.current_bytes) == ("fetched", 10)
    assert [layer.status for layer in progress.finished()] == ["done"]
