"""A second of fuzzing each target in every run; ``make fuzz`` goes on without end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.fuzz.targets import TARGETS

if TYPE_CHECKING:
    from collections.abc import Iterator

REPOSITORY = Path(__file__).parents[2]
SECONDS = 1


@pytest.fixture(scope="module")
def fuzzers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[Path, object]]]:
    """All of them at once: most of the time goes into their start."""
    pytest.importorskip("atheris", reason="atheris has no wheel for this machine")
    running = {}
    for name in TARGETS:
        directory = tmp_path_factory.mktemp(name)
        with (directory / "log").open("wb") as log:
            process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "tests.fuzz.run", name, str(directory / "corpus")),
                    *(f"-max_total_time={SECONDS}", "-timeout=10", "-rss_limit_mb=1024"),
                ],
                cwd=REPOSITORY,
                stdout=log,
                stderr=log,
            )
        running[name] = (directory, process)
    yield running
    for _, process in running.values():
        process.kill()
        process.wait()


@pytest.mark.parametrize("name", TARGETS)
def test_nothing_but_errors_in_words_comes_of_any_input(
    name: str, fuzzers: dict[str, tuple[Path, subprocess.Popen[bytes]]]
) -> None:
    directory, process = fuzzers[name]
    code = process.wait(timeout=50)
    said = (directory / "log").read_text(errors="replace")
    crashes = [path.read_bytes() for path in (directory / "corpus").glob("crash-*")]
    assert (code, crashes) == (0, []), said[-4000:]
    assert "Done " in said  # libFuzzer ran to the end of its time


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_are_accepted_or_refused_in_words(name: str) -> None:
    target = TARGETS[name]
    for seed in target.seeds():
        for cut in {0, 1, len(seed) // 2, len(seed) - 1, len(seed)}:
            target.run(seed[:cut])
