"""The report for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tools.bench.cases import CASES
from tools.bench.goals import QUICK_GOALS, verdicts
from tools.bench.report.table import HEADINGS, blocks

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tools.bench.report.run import Run

_WIDTHS = (26, 11, 11, 11, 4, 17, 13)


def text(run: Run) -> str:
    """All figures, whether goals were reached, and who could not be measured."""
    return "\n".join(_lines(run)) + "\n"


def _lines(run: Run) -> Iterator[str]:
    for case in CASES:
        found = list(blocks(run.figures, case.name))
        if found:
            yield f"\n{case.title}\n{_columns(HEADINGS)}"
        for block in found:
            yield f"  {block.title}"
            yield from (_columns(row) for row in block.rows)
    yield "\nGoals"
    if run.quick:
        yield f"  {QUICK_GOALS}"
    for verdict in verdicts(run.figures):
        if verdict.value is not None:
            word = "reached" if verdict.reached else "not yet"
            goal = verdict.goal
            yield (
                f"  {word}  {verdict.written:>8}{verdict.unit:16} goal {goal.bound:<6g} {goal.what}"
            )
    for absence in run.absences:
        yield f"  not measured: {absence.subject}, {absence.what}: {absence.reason}"


def _columns(row: tuple[str, ...]) -> str:
    first, *rest = (
        f"{word:{width}}" if place == 0 else f"{word:>{width}}"
        for place, (word, width) in enumerate(zip(row, _WIDTHS, strict=True))
    )
    return "    " + " ".join([first, *rest]).rstrip()
