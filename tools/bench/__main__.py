"""Measures, prints, and writes what is to be kept."""

from __future__ import annotations

import argparse
import asyncio
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tools import registry
from tools.bench import host, stage
from tools.bench.bench import Bench, Failure
from tools.bench.cases import CASES
from tools.bench.figures import Role, Subject
from tools.bench.pictures import Pictures
from tools.bench.report.page import page
from tools.bench.report.plots import draw
from tools.bench.report.run import Absence, Run
from tools.bench.report.text import text
from tools.bench.scale import FULL, QUICK

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tools.bench.case import Case

_RESULTS = Path("benchmarks")
_NEEDED = ("runc", "crun", "docker-registry", "mkfs.ext4", "igzip")
_QUICK_S = 148.0
"""After so long a quick run measures no more: it has three minutes, its end included."""

_EVERYBODY = Subject("everybody", Role.PEER)
_OURS = Subject("Theseus", Role.OURS)


def main() -> int:
    """Returns 1 if something of ours could not be measured."""
    options = _options()
    missing = [name for name in _NEEDED if shutil.which(name) is None]
    if missing:
        sys.stderr.write(f"bench: needs {', '.join(missing)}: use make bench\n")
        return 2
    out = options.out
    if out is None and not options.quick and not options.only:
        out = _RESULTS
    try:
        run = asyncio.run(_measure(options.only or CASES, quick=options.quick))
    except (KeyboardInterrupt, asyncio.CancelledError):
        sys.stderr.write("bench: interrupted\n")
        return 130
    sys.stdout.write(text(run))
    if out is not None:
        _keep(run, out)
    return 1 if any(absence.subject == _OURS.name for absence in run.absences) else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="small numbers: three minutes at most")
    add("--only", type=_cases, help=f"cases, with commas: {', '.join(c.name for c in CASES)}")
    add("--out", type=Path, help="directory for tables, plots and JSON; benchmarks if all was run")
    return parser.parse_args()


def _cases(names: str) -> list[Case]:
    wanted = names.split(",")
    unknown = set(wanted) - {case.name for case in CASES}
    if unknown:
        raise argparse.ArgumentTypeError(f"there is no case {', '.join(sorted(unknown))}")
    return [case for case in CASES if case.name in wanted]


async def _measure(cases: Sequence[Case], *, quick: bool) -> Run:
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    scale, machine, began = QUICK if quick else FULL, host.described(), time.monotonic()
    built = stage.build()
    with registry.serving(built.directory / "registry") as address:
        async with Bench(scale, built, Pictures(address, scale), _say) as bench:
            for case in cases:
                bench.case = case.name
                _say(f"{time.monotonic() - began:6.0f} s  {case.name}")
                left_s = began + _QUICK_S - time.monotonic() if quick else None
                await _case(bench, case, left_s)
            return Run(
                machine,
                quick,
                time.monotonic() - began,
                bench.figures,
                tuple(Absence(f.subject.name, f.what, f.reason) for f in bench.failures),
            )


async def _case(bench: Bench, case: Case, left_s: float | None) -> None:
    """Measure a case, as far as time is left."""
    try:
        async with asyncio.timeout(left_s):
            with bench.forgiving(_OURS):
                await case.measure(bench)
    except TimeoutError:
        hint = f"no time was left: make bench QUICK=1 ONLY={case.name}"
        bench.failures.append(Failure(_EVERYBODY, case.name, hint))


def _keep(run: Run, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    run.write(directory / "results.json")
    plots = draw(run.figures, directory)
    (directory / "RESULTS.md").write_text(page(run, plots))


def _say(words: str) -> None:
    sys.stderr.write(f"{words}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
