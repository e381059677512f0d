"""Timing in turns: a machine's speed drifts, and only what was measured side by side compares."""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence

    from tools.bench.bench import Bench
    from tools.bench.figures import Quantity, Subject


class Stopwatch:
    """What one round of a trial found, by what it is of: seconds, if it was timed here."""

    def __init__(self) -> None:
        self.found: dict[Quantity, float] = {}

    @contextmanager
    def __call__(self, quantity: Quantity) -> Iterator[None]:
        """Time a block."""
        began = time.perf_counter()
        yield
        self.found[quantity] = time.perf_counter() - began


@dataclass(frozen=True, slots=True)
class Trial:
    """What is done for one subject in each round.

    Attributes:
        once: does it, and times with the stopwatch what counts of it.
    """

    subject: Subject
    once: Callable[[Stopwatch], Awaitable[None]]
    name: str = field(default="", compare=False)


async def interleave(
    bench: Bench, trials: Sequence[Trial], rounds: int, *, warm: bool = True
) -> None:
    """Add ``rounds`` samples of each trial's quantities to the bench's figures.

    A round before them warms up. The order turns, so that nobody always follows the same one. A
    trial that fails is not tried again: it is named in the report with its reason.
    """
    left = list(trials)
    samples: dict[Trial, list[dict[Quantity, float]]] = {trial: [] for trial in trials}
    for number in range(0 if warm else 1, rounds + 1):
        turn = number % max(1, len(left))
        for trial in [*left[turn:], *left[:turn]]:
            watch = Stopwatch()
            with bench.forgiving(trial.subject, trial.name) as outcome:
                await trial.once(watch)
            if not outcome.well:
                left.remove(trial)
            elif number:
                samples[trial].append(watch.found)
    for trial, rounds_found in samples.items():
        for found in rounds_found:
            for quantity, value in found.items():
                bench.figures.add(quantity, trial.subject, value)
