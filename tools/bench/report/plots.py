"""Plots: bars for what was measured once, lines for what grows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tools.bench.cases import CASES
from tools.bench.figures import Role, Unit

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from tools.bench.figures import Figure, Figures, Quantity

_COLOURS = {
    Role.OURS: ("#c44e52",),
    Role.PEER: ("#4c72b0", "#64b5cd", "#8172b2"),
    Role.LIMIT: ("#999999", "#bbbbbb", "#777777"),
}
_COLUMNS = 2
_DPI = 90


def draw(figures: Figures, directory: Path) -> dict[str, str]:
    """Write a PNG per case; returns file names by case."""
    # Late, and only here: a bench without plots needs no matplotlib.
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    names = {}
    for case in CASES:
        panels = _panels({q: g for q, g in figures.groups().items() if q.case == case.name})
        if not panels:
            continue
        lines = -(-len(panels) // _COLUMNS)
        figure, axes = plt.subplots(
            lines, _COLUMNS, figsize=(11, 0.6 + 2.4 * lines), squeeze=False, layout="constrained"
        )
        spots = [spot for line in axes for spot in line]
        for spot, (what, groups) in zip(spots, panels.items(), strict=False):
            _panel(spot, what, groups)
        for spot in spots[len(panels) :]:
            spot.set_axis_off()
        figure.suptitle(case.title)
        names[case.name] = f"{case.name}.png"
        figure.savefig(directory / names[case.name], dpi=_DPI, metadata={"Software": None})
        plt.close(figure)
    return names


def _panels(
    groups: Mapping[Quantity, Sequence[Figure]],
) -> dict[str, list[tuple[Quantity, Sequence[Figure]]]]:
    panels: dict[str, list[tuple[Quantity, Sequence[Figure]]]] = {}
    for quantity, group in groups.items():
        panels.setdefault(quantity.what, []).append((quantity, group))
    return panels


def _panel(spot: Any, what: str, groups: list[tuple[Quantity, Sequence[Figure]]]) -> None:
    quantity = groups[0][0]
    scale, unit = (1e3, "ms") if quantity.unit is Unit.SECONDS else (1.0, str(quantity.unit))
    spot.set_title(what, fontsize=8)
    spot.tick_params(labelsize=7)
    if len(groups) > 1:
        _lines(spot, groups, scale)
        spot.set_xlabel(quantity.axis, fontsize=7)
        spot.set_ylabel(unit, fontsize=7)
    else:
        _bars(spot, groups[0][1], scale)
        spot.set_xlabel(unit, fontsize=7)


def _bars(spot: Any, group: Sequence[Figure], scale: float) -> None:
    figures = list(reversed(group))
    medians = [figure.median * scale for figure in figures]
    below = [m - min(f.samples) * scale for m, f in zip(medians, figures, strict=True)]
    above = [max(f.samples) * scale - m for m, f in zip(medians, figures, strict=True)]
    spot.barh(
        [figure.subject.name for figure in figures],
        medians,
        xerr=[below, above],
        color=[_COLOURS[figure.subject.role][0] for figure in figures],
        error_kw={"elinewidth": 0.8, "capsize": 2},
    )


def _lines(spot: Any, groups: list[tuple[Quantity, Sequence[Figure]]], scale: float) -> None:
    points: dict[tuple[str, Role], list[tuple[int, float]]] = {}
    for quantity, group in groups:
        for figure in group:
            key = figure.subject.name, figure.subject.role
            points.setdefault(key, []).append((quantity.at or 0, figure.median * scale))
    used = dict.fromkeys(Role, 0)
    for (name, role), line in points.items():
        colours = _COLOURS[role]
        colour = colours[used[role] % len(colours)]
        used[role] += 1
        x, y = zip(*line, strict=True)
        spot.plot(x, y, marker="o", markersize=3, linewidth=1.2, color=colour, label=name)
    spot.set_ylim(bottom=0)
    spot.legend(fontsize=6)
