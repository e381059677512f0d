"""What a case is: a name to ask for, and a function that measures something."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tools.bench.bench import Bench


@dataclass(frozen=True, slots=True)
class Case:
    """One case.

    Attributes:
        name: what ``ONLY=`` takes.
        title: a heading.
        about: what the figures are, and are not.
        measure: adds figures of the case to the bench's.
    """

    name: str
    title: str
    about: str
    measure: Callable[[Bench], Awaitable[None]]
