"""Names of images: the grammar, and the short forms."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common.errors import InvalidArgument
from services.containerd.images.reference import (
    Reference,
    familiar_name,
    oci_ref_name,
    parse_familiar_name,
    parse_reference,
)

HEX = "0123456789abcdef" * 4
DIGEST = f"sha256:{HEX}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("docker.io/library/alpine:3.20", Reference("docker.io", "library/alpine", "3.20")),
        ("localhost:5000/a", Reference("localhost:5000", "a")),
        (f"r.example/a/b@{DIGEST}", Reference("r.example", "a/b", "", DIGEST)),
        (f"r.example/a:t@{DIGEST}", Reference("r.example", "a", "t", DIGEST)),
        ("[::1]:5000/x:1", Reference("[::1]:5000", "x", "1")),
        ("UPPER.example/a", Reference("UPPER.example", "a")),
        ("a/b__c/d-e.f---g:T_1", Reference("a", "b__c/d-e.f---g", "T_1")),
        ("alpine", Reference("", "alpine")),
    ],
)
def test_full_references_are_read_and_written_back(text: str, expected: Reference) -> None:
    assert parse_reference(text) == expected
    assert str(parse_reference(text)) == text


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "empty"),
        ("https://r.example/a:1", "scheme"),
        ("r.example/Upper:1", "lower case"),
        ("r.example/a:", "tag"),
        ("r.example/a:-x", "tag"),
        ("r.example/a:" + "t" * 129, "tag"),
        ("r.example/a b", "want"),
        ("r.example/a/", "want"),
        ("r.example//a", "want"),
        ("r.example/../a", "want"),
        ("r.example/a___b", "want"),
        ("r.example/a@sha256:beef", "hex digits"),
        ("r.example/a@", "digest"),
        ("r.example/a@md5:" + "0" * 32, "unsupported"),
        ("r.example/" + "a" * 256, "255"),
        ("r.example/" + "a/" * 600, "1024"),
        ("r.example/a\n", "want"),
        (":1", "no repository"),
    ],
)
def test_what_breaks_the_grammar_is_refused_in_words(text: str, why: str) -> None:
    with pytest.raises(InvalidArgument, match=why):
        parse_reference(text)


@pytest.mark.parametrize(
    ("short", "full"),
    [
        ("alpine", "docker.io/library/alpine:latest"),
        ("alpine:3", "docker.io/library/alpine:3"),
        ("somebody/tool:1", "docker.io/somebody/tool:1"),
        ("docker.io/alpine", "docker.io/library/alpine:latest"),
        ("index.docker.io/alpine", "docker.io/library/alpine:latest"),
        ("localhost/x", "localhost/x:latest"),
        ("localhost:5000/x:1", "localhost:5000/x:1"),
        ("r.example/x", "r.example/x:latest"),
        ("Host/x", "Host/x:latest"),
        (f"alpine:3@{DIGEST}", f"docker.io/library/alpine@{DIGEST}"),
        (f"alpine@{DIGEST}", f"docker.io/library/alpine@{DIGEST}"),
    ],
)
def test_familiar_names_are_completed(short: str, full: str) -> None:
    assert str(parse_familiar_name(short)) == full


@pytest.mark.parametrize("text", [HEX, "", "Alpine", "a:b:c", "/a", "docker.io/", "x/"])
def test_familiar_names_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_familiar_name(text)
    assert repr(text) in caught.value.message


@pytest.mark.parametrize(
    ("full", "short"),
    [
        ("docker.io/library/alpine:latest", "alpine:latest"),
        ("docker.io/library/a/b:1", "library/a/b:1"),
        ("docker.io/somebody/tool:1", "somebody/tool:1"),
        ("r.example/x:1", "r.example/x:1"),
    ],
)
def test_familiar_name_is_the_shortest(full: str, short: str) -> None:
    assert familiar_name(parse_reference(full)) == short
    assert str(parse_familiar_name(short)) == full


def test_oci_ref_name_is_the_tag_or_the_whole_name() -> None:
    assert oci_ref_name("docker.io/library/alpine:3") == "3"
    assert oci_ref_name("localhost:5000/x") == "localhost:5000/x"
    assert oci_ref_name(f"r.example/x@{DIGEST}") == f"r.example/x@{DIGEST}"
    assert oci_ref_name(f"r.example/x:1@{DIGEST}") == f"1@{DIGEST}"
    assert oci_ref_name("anything at all") == "anything at all"


@given(st.text(max_size=200))
def test_any_text_is_a_reference_or_refused(text: str) -> None:
    for parse in (parse_reference, parse_familiar_name):
        try:
            reference = parse(text)
        except InvalidArgument:
            continue
        assert parse_reference(str(reference)) == reference
