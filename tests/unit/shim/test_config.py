from __future__ import annotations

import json

import pytest

from services.common.errors import InvalidArgument, TheseusError
from services.shim.birth import REQUEST_MAX_BYTES, read_request
from services.shim.config import ShimConfig

REQUEST = {
    "namespace": "n",
    "id": "c",
    "bundle": "/b",
    "socket": "/s",
    "registry": "/r/containerd.sock",
    "instance_id": "0" * 32,
}


def test_request_becomes_settings_with_defaults_and_unknown_keys_ignored():
    config = ShimConfig.from_request({**REQUEST, "future": 1, "linger_s": 3})
    assert (config.namespace, str(config.bundle), config.default_runtime) == ("n", "/b", "runc")
    assert config.linger_s == 3.0


def test_settings_come_back_from_their_own_request():
    config = ShimConfig.from_request({**REQUEST, "keeper": "/k.sock", "adopt": True})
    assert ShimConfig.from_request(json.loads(json.dumps(config.to_request()))) == config


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"namespace": None}, "namespace"),
        ({"id": ""}, "id"),
        ({"id": 7}, "id"),
        ({"bundle": "relative"}, "bundle"),
        ({"socket": "/a\0b"}, "socket"),
        ({"socket": "/" + "a" * 5000}, "socket"),
        ({"log_level": "loud"}, "log_level"),
        ({"runtime_timeout_s": 0}, "runtime_timeout_s"),
        ({"runtime_timeout_s": True}, "runtime_timeout_s"),
        ({"linger_s": "1"}, "linger_s"),
        ({"adopt": 1}, "adopt"),
        ({"keeper": "relative"}, "keeper"),
    ],
)
def test_bad_setting_is_named(change, field):
    request = {**REQUEST, **change}
    if request.get("namespace") is None:
        del request["namespace"]
    with pytest.raises(InvalidArgument) as caught:
        ShimConfig.from_request(request)
    assert caught.value.field == field


@pytest.mark.parametrize(
    "data", [b"", b"\xff\x00", b"[]", b"{", b'"text"', b"{}", b" " * (REQUEST_MAX_BYTES + 1)]
)
def test_garbage_is_no_request(data):
    with pytest.raises(TheseusError):
        read_request(data)


def test_request_is_read():
    assert read_request(json.dumps(REQUEST).encode()).id == "c"
