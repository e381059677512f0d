"""``@frozen``: data classes that cannot be changed, at a third of what they would cost a start.

``@dataclass(frozen=True, slots=True)`` has Python compile six functions for each class, 0.5 ms; a
tier has some hundred of them, most of which a start never makes an instance of. Here ``__init__``,
which should be as quick as it can be, is compiled for the first instance, and the others are not
compiled at all. Everything else is the standard library's: ``field``, ``fields``, ``replace``. A
process that is forked many times compiles what is left before (:func:`compile_all`).
"""

from __future__ import annotations

from dataclasses import MISSING, FrozenInstanceError, dataclass, field, fields
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, dataclass_transform

if TYPE_CHECKING:
    from collections.abc import Callable

    from _typeshed import DataclassInstance

T = TypeVar("T")

_ABSENT = object()
_uncompiled: set[Any] = set()


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def frozen(cls: type[T]) -> type[T]:
    """Make a class one of frozen instances with slots, as its annotations say."""
    if not cls.__doc__:
        cls.__doc__ = cls.__name__  # else it would be made of the signature, which takes longer
    made: Any = dataclass(init=False, repr=False, eq=False, slots=True)(cls)
    names = tuple(made.__dataclass_fields__)
    values: Callable[[Any], Any] = attrgetter(*names) if names else lambda _: ()

    def __init__(self: Any, *arguments: Any, **keywords: Any) -> None:
        _compile(made)
        made.__init__(self, *arguments, **keywords)

    def __eq__(self: Any, other: Any) -> Any:
        if other.__class__ is not self.__class__:
            return NotImplemented
        return values(self) == values(other)

    def __hash__(self: Any) -> int:
        return hash(values(self))

    def __reduce__(self: Any) -> tuple[Any, ...]:
        return self.__class__, tuple(getattr(self, name) for name in names)

    for function in (__init__, __eq__, __hash__, __reduce__, __repr__, __setattr__, __delattr__):
        if function.__name__ not in cls.__dict__:
            setattr(made, function.__name__, function)
    if made.__init__ is __init__:
        _uncompiled.add(made)
    frozen_class: type[T] = made
    return frozen_class


def compile_all() -> None:
    """Compile ``__init__`` of all classes that there are and have had no instance yet."""
    for made in tuple(_uncompiled):
        _compile(made)


def plain(record: DataclassInstance) -> dict[str, Any]:
    """The fields of a data class of plain values, to be written; nothing is copied.

    ``dataclasses.asdict``, which looks into each value for more to copy, was a twentieth of a
    shim's work, and a quarter of what a bundle takes.
    """
    return {field: getattr(record, field) for field in record.__dataclass_fields__}


def __repr__(self: Any) -> str:
    shown = (f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if f.repr)
    return f"{self.__class__.__qualname__}({', '.join(shown)})"


def __setattr__(self: Any, name: str, value: object) -> NoReturn:
    raise FrozenInstanceError(f"cannot assign to field {name!r}")


def __delattr__(self: Any, name: str) -> NoReturn:
    raise FrozenInstanceError(f"cannot delete field {name!r}")


def _compile(made: Any) -> None:
    made.__init__ = _compiled_init(made)
    _uncompiled.discard(made)


def _compiled_init(made: Any) -> Any:
    parameters, lines = ["self"], []
    names: dict[str, object] = {"absent": _ABSENT}
    for number, each in enumerate(fields(made)):
        # A slot's own setter: that of the class refuses.
        names[f"set{number}"] = getattr(made, each.name).__set__
        value = each.name
        if each.default_factory is not MISSING:
            names[f"make{number}"] = each.default_factory
            parameters.append(f"{each.name}=absent")
            value = f"make{number}() if {each.name} is absent else {each.name}"
        elif each.default is not MISSING:
            names[f"default{number}"] = each.default
            parameters.append(f"{each.name}=default{number}")
        else:
            parameters.append(each.name)
        lines.append(f" set{number}(self, {value})")
    text = f"def __init__({', '.join(parameters)}):\n" + "\n".join(lines or [" pass"])
    exec(text, names)  # of names and numbers, as the standard library does
    function: Any = names["__init__"]
    function.__qualname__ = f"{made.__qualname__}.__init__"
    return function
