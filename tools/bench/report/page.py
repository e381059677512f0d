"""The report as a page: benchmarks/RESULTS.md."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tools.bench.cases import CASES
from tools.bench.goals import QUICK_GOALS, Measure, verdicts
from tools.bench.report.table import HEADINGS, blocks

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from tools.bench.report.run import Run

_INTRODUCTION = """\
# Results

Made by `make bench{quick}` on {date}; it took {minutes:.0f} minutes. Everything was measured in
one run, interleaved, with the same images, runtimes and options. **Only ratios within one run
count**: others share the machine, and its load before this run was {load:.1f} on {cores} cores.
"""

_CONDITIONS = """\
Every engine has a root of its own on a fresh ext4 (a loop device), its state on a tmpfs, and shares
a network namespace with the others. dockerd runs with `--live-restore`, containerd without the
plug-ins that dockerd leaves out too (CRI, and snapshotters other than overlayfs); podman has no
server and is measured by its command. Medians; `min` and `max` beside them; `n` samples.

## What is durable

No figure of Theseus is bought with durability: records go to SQLite with `synchronous=FULL`, blobs
are fsynced before they are recorded, and a layer's snapshot is committed after a `syncfs` of its
file system. Its pulls so include what the peers leave to the kernel's write-back: compare
`to the disk` with `to the disk`. What each engine waited for is counted under
[What is on the disk](#what-is-on-the-disk).
"""


def page(run: Run, plots: Mapping[str, str]) -> str:
    """The page; ``plots`` are file names beside it, by case."""
    return "\n".join(_parts(run, plots))


def _parts(run: Run, plots: Mapping[str, str]) -> Iterator[str]:
    host = run.host
    yield _INTRODUCTION.format(
        quick=" QUICK=1" if run.quick else "",
        date=host.began_at,
        minutes=run.seconds / 60,
        load=host.load,
        cores=host.cores,
    )
    versions = "; ".join(f"{name} {version}" for name, version in host.versions.items())
    yield (
        f"{host.processor}, {host.cores} cores, {host.memory_gib:.0f} GiB; Linux {host.kernel}, "
        f"cgroup {host.cgroups}; {versions}.\n"
    )
    yield _CONDITIONS
    yield "## Goals\n"
    if run.quick:
        yield f"{QUICK_GOALS}\n"
    yield from _goals(run)
    if run.absences:
        yield "\n## What could not be measured\n"
        rows = [(a.subject, a.what, a.reason.replace("|", "\\|")) for a in run.absences]
        yield from _table(("who", "what", "why"), rows)
    for case in CASES:
        found = list(blocks(run.figures, case.name))
        if not found:
            continue
        yield f"\n## {case.title}\n\n{case.about}\n"
        if case.name in plots:
            yield f"![{case.title}]({plots[case.name]})\n"
        lines = [
            (block.title if place == 0 else "", *row)
            for block in found
            for place, row in enumerate(block.rows)
        ]
        yield from _table(("what", *HEADINGS), lines)
    yield ""


def _goals(run: Run) -> Iterator[str]:
    rows = []
    for verdict in verdicts(run.figures):
        goal = verdict.goal
        peer = f" ({goal.peer})" if goal.peer else ""
        of = "" if goal.measure is Measure.ITSELF else f", {goal.measure}{peer}"
        unit = verdict.unit if goal.measure is Measure.ITSELF else "x"
        value = "not measured" if verdict.value is None else f"{verdict.written}{unit}"
        word = "" if verdict.value is None else "yes" if verdict.reached else "**no**"
        rows.append((f"{goal.what}{of}", f"{goal.bound:g}", value, word))
    yield from _table(("figure", "goal", "found", "reached"), rows)


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(headings)} |"
    yield f"|{' --- |' * len(headings)}"
    yield from (f"| {' | '.join(row)} |" for row in rows)
