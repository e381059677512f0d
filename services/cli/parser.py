"""Command lines as docker's users write them, on argparse.

Short options combine (``-it``), there are no abbreviations, and where a command's words may be
another command's line, options end at the first word. What is wrong raises :class:`UsageError`.
"""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from collections.abc import Sequence


class UsageError(Exception):
    """A command line that cannot be understood.

    Attributes:
        hint: where to read on.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class Parser(argparse.ArgumentParser):
    """Parser of one command.

    Args:
        prog: words that call it, e.g. ``theseus run``.
        usage: what follows them.
        summary: one line about it.
    """

    def __init__(self, prog: str, usage: str, summary: str) -> None:
        super().__init__(
            prog=prog,
            usage=f"{prog} {usage}".rstrip(),
            description=summary,
            add_help=False,
            allow_abbrev=False,
            formatter_class=_Formatter,
        )
        self.add_argument("--help", action="help", help="print this")
        self._words = ""
        self._at_least = 0
        self._at_most: int | None = 0
        self._options_end = False

    def flag(self, *names: str, help: str) -> None:
        """An option without a value."""
        self.add_argument(*names, action="store_true", help=help)

    def option(self, *names: str, metavar: str, help: str, default: str = "") -> None:
        """An option with one value, a string."""
        self.add_argument(*names, metavar=metavar, help=help, default=default)

    def many(self, *names: str, metavar: str, help: str) -> None:
        """An option that may be repeated; its value is a list of strings."""
        self.add_argument(*names, action="append", default=[], metavar=metavar, help=help)

    def words(
        self,
        name: str,
        *,
        at_least: int = 0,
        at_most: int | None = None,
        options_end: bool = False,
    ) -> None:
        """What is no option; a list of strings.

        Args:
            name: attribute that gets the list.
            at_least: how many there must be.
            at_most: how many there may be; None for any number.
            options_end: with True everything from the first word on is a word.
        """
        self._words, self._at_least, self._at_most = name, at_least, at_most
        self._options_end = options_end
        self.add_argument(
            name, nargs=argparse.REMAINDER if options_end else "*", help=argparse.SUPPRESS
        )

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Parse ``arguments``.

        Raises:
            UsageError: they make no sense.
            SystemExit: they ask for help, which is printed.
        """
        parse = self.parse_known_args if self._options_end else self.parse_known_intermixed_args
        namespace, unknown = parse(arguments)
        words = getattr(namespace, self._words) if self._words else []
        if unknown:
            if unknown[0].startswith("-") and unknown[0] != "-":
                self.error(f"unknown flag: {unknown[0]}")
            words = [*words, *unknown]
        if self._options_end and words and words[0] == "--":
            words = words[1:]
            setattr(namespace, self._words, words)
        if len(words) < self._at_least:
            self.error(f"'{self.prog}' requires at least {_count(self._at_least)}")
        if self._at_most is not None and len(words) > self._at_most:
            accepts = f"at most {_count(self._at_most)}" if self._at_most else "no arguments"
            self.error(f"'{self.prog}' accepts {accepts}")
        return namespace

    def error(self, message: str) -> NoReturn:
        """Raise what is wrong, in words near to docker's."""
        text = re.sub(r"^argument (\S+?): ", r"invalid argument for \1: ", message)
        text = text.replace("expected one argument", "a value is missing")
        raise UsageError(text, f"Usage:  {self.usage}\n\nSee '{self.prog} --help'.")


class _Formatter(argparse.HelpFormatter):
    """One line an option: all its names, and its value's name once."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=40, width=100)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        names = ", ".join(action.option_strings)
        names = names if names.startswith("-") and not names.startswith("--") else f"    {names}"
        if action.nargs == 0:
            return names
        return f"{names} {self._format_args(action, action.dest.upper())}"


def _count(number: int) -> str:
    return f"{number} argument" if number == 1 else f"{number} arguments"
