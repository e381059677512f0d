"""Figures as rows of words, for the terminal and for the page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tools.bench.figures import Role, Unit, best, ratio

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tools.bench.figures import Figure, Figures, Quantity

HEADINGS = ("who", "median", "min", "max", "n", "to the best peer", "to the limit")


@dataclass(frozen=True, slots=True)
class Block:
    """One quantity: its title, and a row for each who was measured, the words as in HEADINGS."""

    title: str
    rows: tuple[tuple[str, ...], ...]


def blocks(figures: Figures, case: str) -> Iterator[Block]:
    """A case's figures."""
    for quantity, group in figures.groups().items():
        if quantity.case == case:
            yield Block(title(quantity), tuple(_row(figure, group) for figure in group))


def title(quantity: Quantity) -> str:
    """A quantity in words."""
    return (
        quantity.what
        if quantity.at is None
        else f"{quantity.what}: {quantity.at:,} {quantity.axis}"
    )


def number(value: float, unit: Unit) -> str:
    """A value with its unit, to three digits or so."""
    if unit is Unit.SECONDS:
        return f"{value * 1e3:.1f} ms" if value < 1 else f"{value:.2f} s"
    if unit is Unit.COUNT:
        return f"{value:.0f}"
    return f"{value:.1f} {unit}"


def times(value: float | None) -> str:
    """A ratio; empty if there is none."""
    return "" if value is None else f"{value:.2f}x"


def _row(figure: Figure, group: Sequence[Figure]) -> tuple[str, ...]:
    unit = figure.quantity.unit
    compared = unit is not Unit.COUNT
    ours = figure.subject.role is Role.OURS and compared
    limited = figure.subject.role is not Role.LIMIT and compared
    return (
        figure.subject.name,
        number(figure.median, unit),
        number(min(figure.samples), unit),
        number(max(figure.samples), unit),
        str(len(figure.samples)),
        times(ratio(figure, best(group, Role.PEER))) if ours else "",
        times(ratio(figure, best(group, Role.LIMIT))) if limited else "",
    )
