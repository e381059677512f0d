"""Frozen data classes do what the standard library's do."""

import copy
import dataclasses
import pickle
from dataclasses import FrozenInstanceError, dataclass, field, replace
from typing import Generic, TypeVar

import pytest

from services.common.frozen import compile_all, frozen

T = TypeVar("T")
made = []


def number():
    made.append(1)
    return len(made)


@frozen
class Place:
    """A place."""

    name: str
    size: int = 3
    tags: dict[str, str] = field(default_factory=dict)
    secret: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class Standard:
    """The same, of the standard library."""

    name: str
    size: int = 3
    tags: dict[str, str] = field(default_factory=dict)
    secret: str = field(default="", repr=False)


@frozen
class Town(Place):
    people: int = 0

    @property
    def label(self):
        return f"{self.name}: {self.people}"


@frozen
class Nothing:
    pass


@frozen
class Box(Generic[T]):
    content: T


@frozen
class Numbered:
    number: int = field(default_factory=number)


@frozen
class Own:
    text: str

    def __repr__(self):
        return "mine"

    def __eq__(self, other):
        return isinstance(other, Own)

    def __hash__(self):
        return 7


def test_fields_are_given_by_place_or_by_name_and_have_defaults():
    assert dataclasses.asdict(Place("a")) == {"name": "a", "size": 3, "tags": {}, "secret": ""}
    place = Place("a", 4, secret="s", tags={"x": "y"})
    assert (place.name, place.size, place.tags, place.secret) == ("a", 4, {"x": "y"}, "s")
    first, second = Place("a"), Place("a")
    assert first.tags is not second.tags


@pytest.mark.parametrize(
    ("arguments", "keywords"),
    [((), {}), (("a", 1, {}, "", 5), {}), (("a",), {"name": "b"}), (("a",), {"colour": "red"})],
)
def test_what_the_signature_does_not_allow_is_refused_in_the_same_words(arguments, keywords):
    messages = []
    for kind in (Standard, Place):
        for _ in range(2):  # the first instance, and the others
            with pytest.raises(TypeError) as caught:
                kind(*arguments, **keywords)
            messages.append(str(caught.value).replace("Standard", "Place"))
    assert len(set(messages)) == 1


def test_nothing_can_be_changed_removed_or_added():
    place = Place("a")
    with pytest.raises(FrozenInstanceError, match="cannot assign to field 'name'"):
        place.name = "b"
    with pytest.raises(FrozenInstanceError, match="cannot assign to field 'other'"):
        place.other = "b"
    with pytest.raises(FrozenInstanceError, match="cannot delete field 'name'"):
        del place.name
    assert place.name == "a"
    assert not hasattr(place, "__dict__")


def test_equality_and_hash_go_by_class_and_fields():
    assert Place("a", tags={"x": "y"}) == Place("a", tags={"x": "y"})
    assert Place("a") != Place("b")
    assert Place("a") != Town("a")
    assert Place("a") != ("a", 3, {}, "")
    assert len({Box(1), Box(1), Box(2)}) == 2
    assert Nothing() == Nothing()
    assert hash(Nothing()) == hash(Nothing())
    with pytest.raises(TypeError):
        hash(Place("a"))  # a dictionary has none


def test_it_shows_as_the_standard_librarys_do_without_what_is_not_to_be_seen():
    shown = repr(Place("a", secret="s"))
    assert shown == repr(Standard("a", secret="s")).replace("Standard", "Place")
    assert "secret" not in shown
    assert repr(Nothing()) == "Nothing()"


def test_a_subclass_has_the_fields_of_both():
    town = Town("a", people=7)
    assert (town.size, town.people, town.label) == (3, 7, "a: 7")
    assert repr(town) == "Town(name='a', size=3, tags={}, people=7)"
    assert replace(town, people=8) == Town("a", people=8)


def test_the_standard_librarys_functions_take_it():
    assert [f.name for f in dataclasses.fields(Place)] == ["name", "size", "tags", "secret"]
    assert dataclasses.is_dataclass(Place("a"))
    changed = replace(Place("a"), size=9)
    assert changed == Place("a", 9)
    match changed:
        case Place(name, size):
            assert (name, size) == ("a", 9)


@pytest.mark.parametrize(
    "again", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
)
def test_it_can_be_copied(again):
    town = Town("a", tags={"x": "y"}, people=2)
    assert again(town) == town
    assert again(Town("never made before")).name == "never made before"


def test_a_default_is_made_once_for_each_instance():
    before = len(made)
    assert Numbered().number == before + 1
    assert Numbered(40).number == 40
    assert Numbered().number == before + 2


def test_what_a_class_says_itself_stays():
    assert repr(Own("a")) == "mine"
    assert Own("a") == Own("b")
    assert hash(Own("a")) == 7


def test_the_class_keeps_its_names():
    assert Place.__doc__ == "A place."
    assert Place.__init__.__name__ == "__init__"
    assert Place("a") and Place.__init__.__qualname__ == "Place.__init__"
    assert Town.__doc__ == "Town"


def test_what_was_compiled_beforehand_is_not_compiled_for_the_first_instance():
    @frozen
    class Pair:
        a: int
        b: int = 2

    @frozen
    class Own:
        a: int

        def __init__(self) -> None:
            raise AssertionError("not called")

    own = Own.__init__
    compile_all()
    compiled = Pair.__init__
    assert Pair(1) == Pair(1, 2)
    assert Pair.__init__ is compiled
    assert Own.__init__ is own
