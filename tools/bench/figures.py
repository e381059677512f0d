"""What was measured: samples of one quantity for one subject, and their ratios."""

from __future__ import annotations

import enum
import statistics
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping


class Role(enum.StrEnum):
    """What a subject is in a comparison."""

    OURS = "ours"
    PEER = "peer"
    LIMIT = "limit"


_ORDER = tuple(Role)


class Unit(enum.StrEnum):
    """What a figure counts. Of the last ones more is better."""

    SECONDS = "s"
    MEBIBYTES = "MiB"
    COUNT = "count"
    PER_SECOND = "/s"
    MEBIBYTES_PER_SECOND = "MiB/s"

    @property
    def more_is_better(self) -> bool:
        """Whether the larger of two figures is the better one."""
        return self in (Unit.PER_SECOND, Unit.MEBIBYTES_PER_SECOND)


@dataclass(frozen=True, slots=True)
class Subject:
    """Who was measured."""

    name: str
    role: Role


@dataclass(frozen=True, slots=True)
class Quantity:
    """What was measured; figures of one quantity can be compared.

    Attributes:
        case: name of the case.
        what: in words, with the options that matter.
        at: the point on the axis of growth, where there is one.
        axis: what ``at`` counts.
    """

    case: str
    what: str
    unit: Unit = Unit.SECONDS
    at: int | None = None
    axis: str = ""


@dataclass(frozen=True, slots=True)
class Figure:
    """All samples of one quantity for one subject."""

    quantity: Quantity
    subject: Subject
    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        """The sample in the middle."""
        return statistics.median(self.samples)


class Figures:
    """A run's figures in the order in which they came."""

    def __init__(self) -> None:
        self._samples: dict[tuple[Quantity, Subject], list[float]] = {}

    def add(self, quantity: Quantity, subject: Subject, *samples: float) -> None:
        """Add samples."""
        self._samples.setdefault((quantity, subject), []).extend(samples)

    def __iter__(self) -> Iterator[Figure]:
        return (
            Figure(quantity, subject, tuple(samples))
            for (quantity, subject), samples in self._samples.items()
            if samples
        )

    def groups(self) -> dict[Quantity, list[Figure]]:
        """The figures that can be compared, by what they are of: ours, peers', limits."""
        found: dict[Quantity, list[Figure]] = {}
        for figure in self:
            found.setdefault(figure.quantity, []).append(figure)
        for group in found.values():
            group.sort(key=lambda figure: _ORDER.index(figure.subject.role))
        return found

    def to_json(self) -> list[dict[str, Any]]:
        """As plain values."""
        return [asdict(figure) for figure in self]

    @classmethod
    def from_json(cls, values: Iterable[Mapping[str, Any]]) -> Figures:
        """What :meth:`to_json` gave."""
        figures = cls()
        for value in values:
            quantity, subject = value["quantity"], value["subject"]
            figures.add(
                Quantity(**{**quantity, "unit": Unit(quantity["unit"])}),
                Subject(subject["name"], Role(subject["role"])),
                *value["samples"],
            )
        return figures


def best(figures: Iterable[Figure], role: Role) -> Figure | None:
    """The best one of a role."""
    found = [figure for figure in figures if figure.subject.role is role]
    if not found:
        return None
    pick = max if found[0].quantity.unit.more_is_better else min
    return pick(found, key=lambda figure: figure.median)


def ratio(figure: Figure, other: Figure | None) -> float | None:
    """Median to median; None without another one, or where that is nothing."""
    if other is None or other is figure or not other.median:
        return None
    return figure.median / other.median
