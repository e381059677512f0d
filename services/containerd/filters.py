r"""containerd's filter language: what every List and Subscribe takes.

    filters   := the object matches any of the strings; no strings, or an empty one, match all
    filter    := selector ("," selector)*          all of them have to match
    selector  := path [ operator value ]           without an operator: the field is there
    path      := field ("." field)*
    field     := quoted | [A-Za-z0-9_]+
    operator  := "==" | "!=" | "~="
    value     := quoted | what follows, up to a comma or a space
    quoted    := "…" with Go's escapes; for ~= also /…/ and |…|

``labels."a.b"==c`` and ``labels.a.b==c`` name the same label. A field that is not there counts as
empty for ``!=`` and ``~=``. What follows ``~=`` is a regular expression, searched for anywhere.
"""

from __future__ import annotations

import re
import unicodedata
from typing import TYPE_CHECKING

from services.common.errors import InvalidArgument
from services.common.frozen import frozen

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    Fields = Callable[[Sequence[str]], str | None]
    """Gives the value of a field of an object by its path; None if it is not there."""

_OPERATOR_CHARACTERS = "=!~"
_QUOTES = '"/|'
_FIELD = re.compile(r"[A-Za-z0-9_]+")
_ESCAPE = re.compile(
    r"""\\(?:([abfnrtv\\])|([0-7]{3})|x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.))"""
)
_SIMPLE_ESCAPES = {
    "a": "\a",
    "b": "\b",
    "f": "\f",
    "n": "\n",
    "r": "\r",
    "t": "\t",
    "v": "\v",
    "\\": "\\",
}
# Go's regular expressions know these inside of brackets, Python's do not.
_POSIX_CLASSES = {
    "[:alnum:]": "0-9A-Za-z",
    "[:alpha:]": "A-Za-z",
    "[:blank:]": r"\t ",
    "[:digit:]": "0-9",
    "[:lower:]": "a-z",
    "[:space:]": r"\t\n\v\f\r ",
    "[:upper:]": "A-Z",
    "[:word:]": "0-9A-Za-z_",
    "[:xdigit:]": "0-9A-Fa-f",
}


@frozen
class Selector:
    """One condition. ``operator`` is empty where the field only has to be there."""

    path: tuple[str, ...]
    operator: str
    value: str
    pattern: re.Pattern[str] | None = None

    def matches(self, fields: Fields) -> bool:
        """Whether an object with these fields meets it."""
        found = fields(self.path)
        if self.operator == "":
            return found is not None
        if self.operator == "==":
            return found == self.value
        if self.operator == "!=":
            return (found or "") != self.value
        assert self.pattern is not None, "the parser makes the pattern of every ~="
        return self.pattern.search(found or "") is not None


@frozen
class Filter:
    """Alternatives, each a list of conditions. Without alternatives it matches all."""

    alternatives: tuple[tuple[Selector, ...], ...] = ()

    def matches(self, fields: Fields) -> bool:
        """Whether an object with these fields meets any of the alternatives."""
        if not self.alternatives:
            return True
        return any(
            all(selector.matches(fields) for selector in selectors)
            for selectors in self.alternatives
        )


def parse(filters: Sequence[str]) -> Filter:
    """The filter that a request's ``filters`` mean.

    Raises:
        InvalidArgument: one of them does not parse; the message shows where.
    """
    return Filter(tuple(tuple(_Parser(text).selectors()) for text in filters))


def map_field(values: Mapping[str, str], path: Sequence[str]) -> str | None:
    """The entry of a map that the rest of a path names; its dots are part of the key."""
    return values.get(".".join(path))


class _Parser:
    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0

    def selectors(self) -> list[Selector]:
        if not self._text:
            return []
        found = [self._selector()]
        while self._at < len(self._text):
            if self._text[self._at] != ",":
                raise self._error(self._at, "a comma or the end was expected")
            self._at += 1
            found.append(self._selector())
        return found

    def _selector(self) -> Selector:
        path = [self._field()]
        while self._peek() == ".":
            self._at += 1
            path.append(self._field())
        if self._peek() in ("", ","):
            return Selector(tuple(path), "", "")
        operator = self._operator()
        value_at = self._at
        value = self._value(operator)
        pattern = self._compile(value, value_at) if operator == "~=" else None
        return Selector(tuple(path), operator, value, pattern)

    def _field(self) -> str:
        self._skip_space()
        if self._peek() == '"':
            return self._quoted()
        match = _FIELD.match(self._text, self._at)
        if match is None:
            raise self._error(self._at, "the name of a field was expected, or one in quotes")
        self._at = match.end()
        return match.group()

    def _operator(self) -> str:
        self._skip_space()
        begin = self._at
        while self._peek() and self._peek() in _OPERATOR_CHARACTERS:
            self._at += 1
        operator = self._text[begin : self._at]
        if operator not in ("==", "!=", "~="):
            raise self._error(begin, "an operator was expected: ==, != or ~=")
        return operator

    def _value(self, operator: str) -> str:
        self._skip_space()
        begin = self._at
        first = self._peek()
        if first and first in _QUOTES:
            if first != '"' and operator != "~=":
                raise self._error(begin, 'a value after == and != is quoted by " only')
            return self._quoted()
        if first in ("", ",", ".", *_OPERATOR_CHARACTERS):
            raise self._error(begin, "a value was expected; write special characters in quotes")
        while _is_value_character(self._peek()):
            self._at += 1
        if begin == self._at:
            raise self._error(begin, "a value was expected")
        return self._text[begin : self._at]

    def _quoted(self) -> str:
        quote, begin = self._text[self._at], self._at
        end = begin + 1
        while end < len(self._text) and self._text[end] != quote:
            if self._text[end] == "\n":
                break
            end += 2 if self._text[end] == "\\" else 1
        if end >= len(self._text) or self._text[end] != quote:
            raise self._error(begin, "the quote does not end")
        self._at = end + 1
        return self._unescape(begin + 1, end, quote)

    def _unescape(self, begin: int, end: int, quote: str) -> str:
        def replace(match: re.Match[str]) -> str:
            simple, octal, byte, short, long, other = match.groups()
            if simple:
                return _SIMPLE_ESCAPES[simple]
            if other == quote:
                return quote
            code = int(octal, 8) if octal else int(byte or short or long or "-1", 16)
            if not 0 <= code <= 0x10FFFF or (octal and code > 255):
                raise self._error(begin + match.start(), "no such escape sequence")
            return chr(code)

        return _ESCAPE.sub(replace, self._text[begin:end])

    def _compile(self, expression: str, at: int) -> re.Pattern[str]:
        for name, characters in _POSIX_CLASSES.items():
            expression = expression.replace(name, characters)
        try:
            return re.compile(expression.replace(r"\z", r"\Z"))
        except (re.error, OverflowError, RecursionError) as error:
            raise self._error(at, f"that is no regular expression: {error}") from error

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _skip_space(self) -> None:
        while self._peek().isspace():
            self._at += 1

    def _error(self, at: int, what: str) -> InvalidArgument:
        before, character, after = self._text[:at], self._text[at : at + 1], self._text[at + 1 :]
        shown = f"{before} >|{character}|< {after}"
        return InvalidArgument(f"filter does not parse: [{shown}]: {what}", field="filters")


def _is_value_character(character: str) -> bool:
    return (
        character not in ("", ",")
        and not character.isspace()
        and unicodedata.category(character)[0] in "LMNPS"
    )
