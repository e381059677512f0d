import json

import pytest

from tools.bench.figures import Figures, Quantity, Role, Subject, Unit, best, ratio
from tools.bench.goals import GOALS, Measure, verdicts
from tools.bench.report.table import blocks, number, title

OURS = Subject("Theseus", Role.OURS)
DOCKERD = Subject("dockerd", Role.PEER)
PODMAN = Subject("podman", Role.PEER)
LIMIT = Subject("bare runc", Role.LIMIT)


def test_samples_of_one_quantity_are_compared_and_ordered_by_role():
    figures = Figures()
    quantity = Quantity("run", "run-to-exit")
    figures.add(quantity, LIMIT, 0.01, 0.03, 0.02)
    figures.add(quantity, DOCKERD, 0.2)
    figures.add(quantity, OURS, 0.1)
    figures.add(quantity, OURS, 0.3, 0.2)

    (group,) = figures.groups().values()

    assert [figure.subject for figure in group] == [OURS, DOCKERD, LIMIT]
    assert [figure.median for figure in group] == [0.2, 0.2, 0.02]


def test_best_is_the_least_time_and_the_most_throughput():
    figures = Figures()
    time, rate = Quantity("a", "a"), Quantity("b", "b", Unit.PER_SECOND)
    for quantity in (time, rate):
        figures.add(quantity, DOCKERD, 2.0)
        figures.add(quantity, PODMAN, 3.0)
    groups = figures.groups()

    assert best(groups[time], Role.PEER).subject is DOCKERD
    assert best(groups[rate], Role.PEER).subject is PODMAN
    assert best(groups[time], Role.LIMIT) is None


def test_there_is_no_ratio_to_nothing_nothing_measured_or_oneself():
    figures = Figures()
    quantity = Quantity("a", "a")
    figures.add(quantity, OURS, 3.0)
    figures.add(quantity, DOCKERD, 2.0)
    figures.add(Quantity("b", "b"), PODMAN, 0.0)
    ours, dockerd, podman = figures

    assert ratio(ours, dockerd) == 1.5
    assert ratio(ours, None) is None
    assert ratio(ours, podman) is None
    assert ratio(ours, ours) is None


def test_json_gives_the_same_figures_again():
    figures = Figures()
    figures.add(Quantity("memory", "PSS", Unit.MEBIBYTES, 50, "containers"), OURS, 4.5)
    figures.add(Quantity("run", "run"), LIMIT, 0.5, 0.25)

    again = Figures.from_json(json.loads(json.dumps(figures.to_json())))

    assert list(again) == list(figures)


@pytest.mark.parametrize(
    ("value", "unit", "words"),
    [
        (0.0123, Unit.SECONDS, "12.3 ms"),
        (1.5, Unit.SECONDS, "1.50 s"),
        (14.0, Unit.COUNT, "14"),
        (28.4, Unit.PER_SECOND, "28.4 /s"),
    ],
)
def test_number_has_a_unit_that_fits(value, unit, words):
    assert number(value, unit) == words


def test_rows_have_ratios_to_the_best_peer_and_to_the_limit():
    figures = Figures()
    quantity = Quantity("run", "run-to-exit", at=1000, axis="others")
    figures.add(quantity, OURS, 0.3)
    figures.add(quantity, DOCKERD, 0.6)
    figures.add(quantity, PODMAN, 0.9)
    figures.add(quantity, LIMIT, 0.1)

    (block,) = blocks(figures, "run")

    assert block.title == title(quantity) == "run-to-exit: 1,000 others"
    assert [row[-2:] for row in block.rows] == [
        ("0.50x", "3.00x"),
        ("", "6.00x"),
        ("", "9.00x"),
        ("", ""),
    ]


def test_counts_are_not_compared():
    figures = Figures()
    quantity = Quantity("durability", "flushes", Unit.COUNT)
    figures.add(quantity, OURS, 10)
    figures.add(quantity, DOCKERD, 20)

    (block,) = blocks(figures, "durability")

    assert block.rows[0][-2:] == ("", "")


def test_goal_of_a_peer_is_judged_by_that_peer_and_by_the_furthest_point():
    goal = next(goal for goal in GOALS if goal.peer == "dockerd" and goal.bound == 0.4)
    figures = Figures()
    quantity = Quantity(goal.case, goal.what)
    figures.add(quantity, OURS, 0.04)
    figures.add(quantity, DOCKERD, 0.1)
    figures.add(quantity, PODMAN, 0.05)

    verdict = next(v for v in verdicts(figures) if v.goal is goal)

    assert verdict.value == pytest.approx(0.4)
    assert verdict.reached


def test_goal_of_a_rate_is_a_lower_bound():
    goal = next(goal for goal in GOALS if goal.case == "rate" and goal.bound == 2.0)
    figures = Figures()
    quantity = Quantity(goal.case, goal.what, Unit.PER_SECOND)
    figures.add(quantity, OURS, 19.0)
    figures.add(quantity, DOCKERD, 10.0)

    verdict = next(v for v in verdicts(figures) if v.goal is goal)

    assert (verdict.value, verdict.reached) == (1.9, False)


def test_goal_on_an_amount_looks_at_the_largest_crowd():
    goal = next(g for g in GOALS if g.case == "memory" and g.measure is Measure.ITSELF)
    figures = Figures()
    for at, mib in ((50, 9.0), (200, 3.5), (0, 1.0)):
        figures.add(Quantity(goal.case, goal.what, Unit.MEBIBYTES, at, "others"), OURS, mib)

    verdict = next(v for v in verdicts(figures) if v.goal is goal)

    assert (verdict.value, verdict.reached) == (3.5, True)


def test_what_was_not_measured_is_neither_reached_nor_missed():
    assert all(v.value is None and not v.reached for v in verdicts(Figures()))


@pytest.mark.parametrize(
    ("value", "written"),
    [(1.9, "1.90"), (1.994, "1.99"), (1.996, "1.996"), (2.0, "2.00"), (2.003, "2.00")],
)
def test_what_misses_its_goal_by_a_little_is_not_written_like_it(value, written):
    figures = Figures()
    goal = next(g for g in GOALS if g.case == "rate" and g.peer == "dockerd")
    quantity = Quantity("rate", goal.what, Unit.PER_SECOND)
    figures.add(quantity, OURS, value)
    figures.add(quantity, DOCKERD, 1.0)

    verdict = next(v for v in verdicts(figures) if v.goal is goal)

    assert verdict.written == written
