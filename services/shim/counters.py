"""Counters, gauges and histograms that are a few numbers each, rendered when somebody asks.

There is one shim per container, and most are never scraped: a metrics library costs each of them a
megabyte for its objects and the pages on which its code lies.
Text format: https://prometheus.io/docs/instrumenting/exposition_formats/ (0.0.4).
"""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

Labels = tuple[tuple[str, str], ...]
"""Names and values of labels."""


class Counter:
    """A number that grows; a gauge, which may also be set, is the same number."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def inc(self, amount: float = 1) -> None:
        """Add to it."""
        self.value += amount

    def set(self, value: float) -> None:
        """Replace it."""
        self.value = value


class Histogram:
    """How many observations lie below each of ``bounds``, which ascend."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, amount: float, /) -> None:
        """Count one observation."""
        self.counts[bisect_left(self.bounds, amount)] += 1
        self.total += amount

    def samples(self, name: str, labels: Labels) -> Iterator[str]:
        """Lines of the page."""
        below = 0
        for bound, count in zip((*self.bounds, float("inf")), self.counts, strict=True):
            below += count
            edge = "+Inf" if bound == float("inf") else repr(float(bound))
            yield sample(f"{name}_bucket", (*labels, ("le", edge)), below)
        yield sample(f"{name}_count", labels, below)
        yield sample(f"{name}_sum", labels, self.total)


def head(name: str, kind: str, words: str) -> str:
    """The two lines that introduce a family."""
    return f"# HELP {name} {words}\n# TYPE {name} {kind}\n"


def sample(name: str, labels: Labels, value: float) -> str:
    """One line of the page, labels in order. Their values are words of ours: no escapes."""
    inside = ",".join(f'{key}="{text}"' for key, text in sorted(labels))
    return f"{name}{{{inside}}} {float(value)!r}\n" if inside else f"{name} {float(value)!r}\n"
