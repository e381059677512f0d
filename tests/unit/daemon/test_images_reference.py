"""References as users write them."""

from __future__ import annotations

import pytest

from services.common.errors import InvalidArgument
from services.daemon.images.reference import id_prefix, parse

DIGEST = "sha256:" + "a" * 64


@pytest.mark.parametrize(
    ("text", "full"),
    [
        ("busybox", "docker.io/library/busybox:latest"),
        ("busybox:1.36", "docker.io/library/busybox:1.36"),
        ("me/app", "docker.io/me/app:latest"),
        ("docker.io/busybox", "docker.io/library/busybox:latest"),
        ("index.docker.io/busybox", "docker.io/library/busybox:latest"),
        ("localhost/a", "localhost/a:latest"),
        ("localhost:5000/a/b:tag", "localhost:5000/a/b:tag"),
        ("host:5000/a", "host:5000/a:latest"),
        ("[::1]:5000/a", "[::1]:5000/a:latest"),
        ("a.b/c__d/e-f.g", "a.b/c__d/e-f.g:latest"),
        (f"busybox@{DIGEST}", f"docker.io/library/busybox@{DIGEST}"),
        (f"busybox:1@{DIGEST}", f"docker.io/library/busybox@{DIGEST}"),
    ],
)
def test_what_is_left_out_takes_its_default(text, full):
    assert str(parse(text)) == full


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":tag",
        "UPPER",
        "a//b",
        "/a",
        "a/",
        "a:",
        "a:-b",
        "a b",
        "a@sha256:short",
        f"a@sha256:{'A' * 64}",
        "a_-b",
        "-a",
        "host:port/a",
        "a" * 300,
        "a" * 64,
        "../a",
        "a/../b",
        "é",
    ],
)
def test_malformed_references_are_refused_by_name(text):
    with pytest.raises(InvalidArgument) as refused:
        parse(text)
    assert refused.value.field == "reference"


@pytest.mark.parametrize(
    ("text", "familiar"),
    [
        ("busybox", "busybox:latest"),
        ("me/app:1", "me/app:1"),
        ("host:5000/a", "host:5000/a:latest"),
    ],
)
def test_users_are_answered_in_their_own_words(text, familiar):
    assert parse(text).familiar == familiar


@pytest.mark.parametrize(
    ("text", "prefix"),
    [
        ("abc", "abc"),
        ("sha256:abc", "abc"),
        ("a" * 64, "a" * 64),
        ("xyz", ""),
        ("abc:latest", ""),
        ("", ""),
    ],
)
def test_what_may_be_an_id(text, prefix):
    assert id_prefix(text) == prefix
