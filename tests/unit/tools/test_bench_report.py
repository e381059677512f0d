import dataclasses
import re

import pytest

from tools.bench.__main__ import _cases
from tools.bench.cases import CASES
from tools.bench.figures import Figures, Quantity, Role, Subject, Unit
from tools.bench.goals import QUICK_GOALS
from tools.bench.host import Host
from tools.bench.report.page import page
from tools.bench.report.run import Absence, Run
from tools.bench.report.text import text


@pytest.fixture
def run():
    figures = Figures()
    ours, peer = Subject("Theseus", Role.OURS), Subject("dockerd", Role.PEER)
    figures.add(Quantity("run", "run-to-exit"), ours, 0.1, 0.2, 0.3)
    figures.add(Quantity("run", "run-to-exit"), peer, 0.4)
    for at in (10, 100):
        figures.add(Quantity("records", "list", at=at, axis="records"), ours, at / 1000)
    figures.add(Quantity("rate", "per second", Unit.PER_SECOND), ours, 30.0)
    return Run(
        host=Host(
            "2024-01-01 00:00 UTC", "6.1", "A processor", 2, 24.0, 0.1, "v1", {"runc": "1.1"}
        ),
        quick=True,
        seconds=90.0,
        figures=figures,
        absences=(Absence("podman", "run", "not | installed"),),
    )


def test_text_has_figures_ratios_and_who_is_missing(run):
    said = text(run)

    assert re.search(r"Theseus +200\.0 ms +100\.0 ms +300\.0 ms +3 +0\.50x\n", said)
    assert "list: 100 records" in said
    assert "not measured: podman, run: not | installed" in said


def test_page_names_machine_versions_plots_and_reasons(run):
    said = page(run, {"run": "run.png"})

    assert "A processor, 2 cores, 24 GiB; Linux 6.1, cgroup v1; runc 1.1." in said
    assert "QUICK=1" in said
    assert "![Run-to-exit](run.png)" in said
    assert "| podman | run | not \\| installed |" in said
    assert "| run-to-exit | Theseus | 200.0 ms | 100.0 ms | 300.0 ms | 3 | 0.50x |  |" in said


def test_goals_of_a_quick_run_are_hints_and_of_a_whole_one_are_not(run):
    whole = dataclasses.replace(run, quick=False)

    for said in (text, lambda run: page(run, {})):
        assert QUICK_GOALS in said(run)
        assert QUICK_GOALS not in said(whole)


def test_page_has_tables_whose_rows_are_as_wide_as_their_headings(run):
    tables = re.findall(r"(?:^\|.*\n?)+", page(run, {}), re.MULTILINE)

    assert len(tables) == 5  # goals, absences, three cases
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def test_run_is_read_as_it_was_written(run, tmp_path):
    run.write(tmp_path / "results.json")
    again = Run.read(tmp_path / "results.json")

    assert list(again.figures) == list(run.figures)
    assert (again.host, again.quick, again.seconds, again.absences) == (
        run.host,
        run.quick,
        run.seconds,
        run.absences,
    )


def test_plots_are_drawn_for_every_case_with_figures(run, tmp_path):
    from tools.bench.report.plots import draw

    names = draw(run.figures, tmp_path)

    assert names == {"run": "run.png", "rate": "rate.png", "records": "records.png"}
    for name in names.values():
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_cases_are_asked_for_by_name_in_their_own_order():
    assert [case.name for case in _cases("pull,run")] == ["run", "pull"]
    with pytest.raises(Exception, match="there is no case walk"):
        _cases("run,walk")


def test_cases_have_names_of_their_own():
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch("[a-z]+", name) for name in names)
