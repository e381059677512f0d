"""containerd's filter language, against tables made from what upstream documents and does."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common.errors import InvalidArgument
from services.containerd.filters import map_field, parse

if TYPE_CHECKING:
    from collections.abc import Sequence

OBJECT = {"name": "foo", "image": "docker.io/library/busybox:latest", "empty": ""}
LABELS = {"bar": "1", "a.b": "x y", "more complex label": "c", "quoted/foo": "/q|", "void": ""}


def fields(path: Sequence[str]) -> str | None:
    if path[0] == "labels":
        return map_field(LABELS, path[1:])
    return OBJECT.get(path[0]) if len(path) == 1 else None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "name",
        "name==foo",
        " name==foo",
        "name == foo",
        'name=="foo"',
        "name!=bar",
        "name~=^f",
        "name~=/^fo+$/",
        "name~=|o|",
        'name~="o{2}"',
        "name~=[[:alpha:]]+",
        r"name~=oo\z",
        "nothing!=x",
        "nothing~=^$",
        "empty",
        'empty==""',
        "image==docker.io/library/busybox:latest",
        "labels.bar",
        "labels.void",
        "labels.bar==1",
        'labels."a.b"=="x y"',
        'labels.a.b=="x y"',
        'labels."more complex label"==c',
        'labels."quoted/foo"=="/q|"',
        r'labels."\u0062ar"=="\x31"',
        r'labels.bar=="\061"',
        "name==foo,labels.bar",
        'name==foo,labels.bar==1,image~="busy"',
        "name!=foo=",
    ],
)
def test_matches(text: str) -> None:
    assert parse([text]).matches(fields)


@pytest.mark.parametrize(
    "text",
    [
        "nothing",
        "name.first",
        "name==fo",
        "name!=foo",
        "name~=^o",
        "nothing==x",
        'nothing==""',
        "labels.baz",
        "labels.bar==2",
        "name==foo,labels.baz",
        'labels."bar "',
    ],
)
def test_does_not_match(text: str) -> None:
    assert not parse([text]).matches(fields)


@pytest.mark.parametrize(
    "text",
    [
        ",",
        ".",
        "==",
        "name==",
        "name=foo",
        "name===foo",
        "name<foo",
        "name==foo ",
        "name==foo, ",
        "name==foo,",
        "name ,image",
        "name.",
        "na-me==foo",
        "name==/foo/",
        "name==|foo|",
        'name=="foo',
        'name=="foo\n"',
        'name=="a"b',
        r'name=="\q"',
        r'name=="\400"',
        r'name=="\U00110000"',
        r"name=='foo'x y",
        'name=="\\',
        "/name/==foo",
        "name~=/(/",
        "name==a\0b",
        "name==\x7f",
    ],
)
def test_refuses_what_does_not_parse(text: str) -> None:
    with pytest.raises(InvalidArgument, match="filter does not parse") as caught:
        parse([text])
    assert caught.value.field == "filters"


def test_error_shows_the_place() -> None:
    with pytest.raises(InvalidArgument, match=r"\[name >\|=\|< foo\]"):
        parse(["name=foo"])


def test_any_of_several_is_enough_and_none_matches_all() -> None:
    assert parse(["nothing", "name==foo"]).matches(fields)
    assert not parse(["nothing", "name==bar"]).matches(fields)
    assert parse(["nothing", ""]).matches(fields)
    assert parse([]).matches(fields)


@given(st.text())
def test_any_text_parses_or_is_refused_in_words(text: str) -> None:
    try:
        parse([text]).matches(fields)
    except InvalidArgument as error:
        assert error.message.startswith("filter does not parse")


@given(st.text(st.characters(exclude_characters='"\\\n'), min_size=1), st.text())
def test_a_quoted_label_is_found_whatever_its_name_is(key: str, other: str) -> None:
    selected = parse([f'labels."{key}"=="v"'])
    assert selected.matches(lambda path: map_field({key: "v"}, path[1:]))
    assert not selected.matches(lambda path: map_field({key + "x": "v"}, path[1:]))
    assert not selected.matches(lambda path: map_field({key: "w" + other}, path[1:]))
