"""What is to be reached, and whether it was: each goal is a limit on one of a run's figures."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tools.bench.figures import Role, best

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tools.bench.figures import Figure, Figures


class Measure(enum.StrEnum):
    """How our figure is looked at."""

    TO_PEER = "times the peer"
    TO_LIMIT = "times the limit"
    ITSELF = ""


@dataclass(frozen=True, slots=True)
class Goal:
    """One line of the table of goals.

    Attributes:
        what: the quantity's name.
        bound: at most that, or at least that where more is better.
        peer: the peer compared with; empty: the best.
        at: the point on the axis of growth; None: the furthest that was measured.
    """

    case: str
    what: str
    bound: float
    measure: Measure
    peer: str = ""
    at: int | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of a goal; ``value`` is None where it was not measured."""

    goal: Goal
    value: float | None
    reached: bool
    unit: str

    @property
    def written(self) -> str:
        """The value with two digits, or three where one that misses would look like its goal."""
        if self.value is None:
            return ""
        text = f"{self.value:.2f}"
        hides_it = not self.reached and float(text) == self.goal.bound
        return f"{self.value:.3f}" if hides_it else text


_CONTAINERD = "run-to-exit through containerd's API, network none"
_DAEMON = "run-to-exit through the daemon's API"
_RATE = "containers started per second through {} API, network none, runc, 8 clients"
_RECOVERY = "from SIGKILL to {}, containerd's API"

GOALS = (
    Goal("run", f"{_CONTAINERD}, runc", 0.7, Measure.TO_PEER),
    Goal("run", f"{_CONTAINERD}, runc", 2.0, Measure.TO_LIMIT),
    Goal("run", f"{_CONTAINERD}, crun", 0.5, Measure.TO_PEER),
    Goal("run", f"{_CONTAINERD}, crun", 3.0, Measure.TO_LIMIT),
    Goal("run", f"{_DAEMON}, network none, runc", 0.4, Measure.TO_PEER, "dockerd"),
    Goal("run", f"{_DAEMON}, network bridge, runc", 0.35, Measure.TO_PEER, "dockerd"),
    Goal("steps", "exec through the daemon's API, crun", 0.6, Measure.TO_PEER, "dockerd"),
    Goal("rate", _RATE.format("the daemon's"), 2.0, Measure.TO_PEER, "dockerd"),
    Goal("rate", _RATE.format("containerd's"), 1.2, Measure.TO_PEER),
    Goal("memory", "PSS of the shim of an idle container, containerd's API", 4.0, Measure.ITSELF),
    Goal(
        "memory",
        "PSS of the shim of an idle container, 16 to a shim, containerd's API",
        0.5,
        Measure.ITSELF,
    ),
    Goal("memory", "PSS of all servers, the daemon's API", 150.0, Measure.ITSELF),
    Goal("recovery", _RECOVERY.format("all listed as running"), 1.0, Measure.ITSELF),
    Goal("recovery", _RECOVERY.format("the first answer"), 0.5, Measure.ITSELF),
    Goal(
        "pull",
        "pull + unpack of many files, to the answer, containerd's API",
        0.7,
        Measure.TO_PEER,
    ),
    Goal(
        "pull",
        "pull + unpack of many files, to the answer, the daemon's API",
        0.7,
        Measure.TO_PEER,
        "dockerd",
    ),
    Goal("logs", "output into a log of lines, the daemon's API", 2.0, Measure.TO_PEER, "dockerd"),
)

QUICK_GOALS = (
    "A quick run has a round or two, fewer containers and smaller images than the goals are about: "
    "take these as hints."
)


def verdicts(figures: Figures) -> Iterator[Verdict]:
    """What became of each goal."""
    for goal in GOALS:
        group = _group(goal, figures)
        ours = best(group, Role.OURS)
        value = None if ours is None else _value(goal, ours, group)
        if value is None or ours is None:
            yield Verdict(goal, None, reached=False, unit="")
            continue
        more = ours.quantity.unit.more_is_better
        reached = value >= goal.bound if more else value <= goal.bound
        unit = f" {goal.measure or ours.quantity.unit}"
        yield Verdict(goal, value, reached=reached, unit=unit)


def _group(goal: Goal, figures: Figures) -> Sequence[Figure]:
    found = [
        (quantity.at or 0, group)
        for quantity, group in figures.groups().items()
        if (quantity.case, quantity.what) == (goal.case, goal.what)
        and goal.at in (None, quantity.at)
    ]
    return max(found, key=lambda pair: pair[0])[1] if found else []


def _value(goal: Goal, ours: Figure, group: Sequence[Figure]) -> float | None:
    if goal.measure is Measure.ITSELF:
        return ours.median
    role = Role.PEER if goal.measure is Measure.TO_PEER else Role.LIMIT
    others = [f for f in group if not goal.peer or f.subject.name == goal.peer]
    other = best(others, role)
    return None if other is None else ours.median / other.median
