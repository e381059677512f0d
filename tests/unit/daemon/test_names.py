"""Names and ids of containers."""

from __future__ import annotations

import pytest

from services.common.errors import InvalidArgument, NotFound
from services.daemon.containers import names
from services.daemon.containers.words import SURNAMES, TRAITS

IDS = ("a" * 64, "ab" + "0" * 62, "f" * 64)
BY_NAME = {"web": IDS[0], "ab": IDS[2]}


def test_ids_are_64_digits_whose_short_form_is_not_a_number():
    made = {names.new_id() for _ in range(200)}
    assert len(made) == 200
    for identity in made:
        assert len(identity) == 64
        assert set(identity) <= set("0123456789abcdef")
        assert not identity[:12].isdigit()


def test_made_up_names_are_valid():
    for attempt in range(6):
        name = names.new_name(attempt)
        assert names.check_name(name) == name
        trait, _, surname = name.partition("_")
        assert trait in TRAITS
        assert surname.rstrip("0123456789") in SURNAMES
    assert len(set(TRAITS)) == len(TRAITS)
    assert len(set(SURNAMES)) == len(SURNAMES)


@pytest.mark.parametrize("name", ["ab", "/ab", "A.b-c_9", "0a"])
def test_names_that_may_be(name):
    assert names.check_name(name) == name.removeprefix("/")


@pytest.mark.parametrize(
    "name", ["a", "-ab", ".ab", "a b", "a/b", "//ab", "ä" * 3, "a" * 256, "a\n"]
)
def test_names_that_may_not_be(name):
    with pytest.raises(InvalidArgument, match="Invalid container name"):
        names.check_name(name)


@pytest.mark.parametrize(
    ("reference", "found"),
    [
        (IDS[0], IDS[0]),
        ("web", IDS[0]),
        ("/web", IDS[0]),
        ("aaa", IDS[0]),
        ("ab", IDS[2]),  # a name comes before the beginning of an id
        ("ab0", IDS[1]),
        ("f", IDS[2]),
    ],
)
def test_containers_are_found(reference, found):
    assert names.find(reference, ids=IDS, by_name=BY_NAME) == found


def test_a_prefix_of_several_is_refused():
    with pytest.raises(InvalidArgument, match="Multiple IDs found with provided prefix: a"):
        names.find("a", ids=IDS, by_name=BY_NAME)


@pytest.mark.parametrize("reference", ["x", "we", "b", "a" * 65, "AAA"])
def test_what_is_not_there_is_named(reference):
    with pytest.raises(NotFound) as error:
        names.find(reference, ids=IDS, by_name=BY_NAME)
    assert error.value.message == f"No such container: {reference}"


def test_nothing_is_no_reference():
    with pytest.raises(InvalidArgument):
        names.find("", ids=IDS, by_name=BY_NAME)
