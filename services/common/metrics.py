"""Counters, gauges and histograms that are a few numbers each, rendered when somebody asks.

A metrics library would be a tenth of what a start imports, for an HTTP server of its own. There is
one shim per container, and most are never scraped: it costs each a megabyte for its objects and the
pages on which its code lies.
Text format: https://prometheus.io/docs/instrumenting/exposition_formats/ (0.0.4).
"""

from __future__ import annotations

import time
from bisect import bisect_left
from contextlib import contextmanager
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

Labels = tuple[tuple[str, str], ...]
"""Names and values of labels."""

CallLabels = tuple[str, str, str]
"""Kind of a call (``unary``, ``bidi_stream`` and so on), service, method."""

BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
"""Of a histogram of seconds, unless it has its own."""

_CALL_LABELS = ("grpc_type", "grpc_service", "grpc_method")
_ESCAPES = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n"})


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

    def samples(self, name: str, labels: Labels) -> Iterator[str]:
        """Its line of the page."""
        yield sample(name, labels, self.value)


class Histogram:
    """How many observations lie below each of ``bounds``, which ascend."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float] = BOUNDS) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, amount: float, /) -> None:
        """Count one observation."""
        self.counts[bisect_left(self.bounds, amount)] += 1
        self.total += amount

    @contextmanager
    def time(self) -> Iterator[None]:
        """Observe how many seconds the block takes, whatever comes of it."""
        began_s = time.perf_counter()
        try:
            yield
        finally:
            self.observe(time.perf_counter() - began_s)

    def samples(self, name: str, labels: Labels) -> Iterator[str]:
        """Lines of the page."""
        below = 0
        for bound, count in zip((*self.bounds, float("inf")), self.counts, strict=True):
            below += count
            edge = "+Inf" if bound == float("inf") else repr(float(bound))
            yield sample(f"{name}_bucket", (*labels, ("le", edge)), below)
        yield sample(f"{name}_count", labels, below)
        yield sample(f"{name}_sum", labels, self.total)


Number = TypeVar("Number", Counter, Histogram)


class Family(Generic[Number]):
    """Numbers of one name, one for each combination of values that its labels have had.

    Args:
        name: as it stands on the page.
        kind: ``counter``, ``gauge`` or ``histogram``.
        words: what it is.
        labels: names of its labels, a fixed few with few values each.
        make: makes a number.
    """

    __slots__ = ("_head", "_labels", "_make", "_numbers", "name")

    def __init__(
        self, name: str, kind: str, words: str, labels: Sequence[str], make: Callable[[], Number]
    ) -> None:
        self.name = name
        self._head = head(name, kind, words)
        self._labels = labels
        self._make: Callable[[], Number] = make
        self._numbers: dict[tuple[str, ...], Number] = {}

    def labels(self, *values: str) -> Number:
        """The number of these values, in the order of the labels' names."""
        number = self._numbers.get(values)
        if number is None:
            number = self._numbers[values] = self._make()
        return number

    def lines(self) -> Iterator[str]:
        """Its part of the page, which another thread than the one that counts may make."""
        yield self._head
        for values, number in tuple(self._numbers.items()):
            yield from number.samples(self.name, tuple(zip(self._labels, values, strict=True)))


class Registry:
    """The families of a page, in the order in which they came."""

    def __init__(self) -> None:
        self._parts: list[Callable[[], Iterable[str]]] = []

    def add(self, lines: Callable[[], Iterable[str]]) -> None:
        """Have ``lines``, called when the page is made, give a part of it."""
        self._parts.append(lines)

    def counter(self, name: str, words: str) -> Counter:
        """A counter without labels; its name ends in ``_total``."""
        return self._family(name, "counter", words, (), Counter).labels()

    def counters(self, name: str, words: str, labels: Sequence[str]) -> Family[Counter]:
        """Counters with labels."""
        return self._family(name, "counter", words, labels, Counter)

    def gauge(self, name: str, words: str) -> Counter:
        """A gauge without labels."""
        return self._family(name, "gauge", words, (), Counter).labels()

    def gauges(self, name: str, words: str, labels: Sequence[str]) -> Family[Counter]:
        """Gauges with labels."""
        return self._family(name, "gauge", words, labels, Counter)

    def histogram(self, name: str, words: str, bounds: Sequence[float] = BOUNDS) -> Histogram:
        """A histogram without labels."""
        return self._family(name, "histogram", words, (), lambda: Histogram(bounds)).labels()

    def histograms(
        self, name: str, words: str, labels: Sequence[str], bounds: Sequence[float] = BOUNDS
    ) -> Family[Histogram]:
        """Histograms with labels."""
        return self._family(name, "histogram", words, labels, lambda: Histogram(bounds))

    def page(self) -> bytes:
        """The page in Prometheus' text format."""
        return "".join(line for lines in self._parts for line in lines()).encode()

    def _family(
        self, name: str, kind: str, words: str, labels: Sequence[str], make: Callable[[], Number]
    ) -> Family[Number]:
        family = Family(name, kind, words, labels, make)
        self.add(family.lines)
        return family


class ServerMetrics:
    """Counts and times the calls of a server; see services.common.server.CallMetrics.

    The names are those that Go's gRPC middleware made common, so that existing dashboards fit.
    """

    def __init__(self, bounds: Sequence[float] = BOUNDS) -> None:
        self._started: dict[CallLabels, int] = {}
        self._handled: dict[tuple[CallLabels, str], int] = {}
        self._handling: dict[CallLabels, Histogram] = {}
        self._bounds = bounds

    def begin(self, labels: CallLabels) -> None:
        """Count the start of a call."""
        self._started[labels] = self._started.get(labels, 0) + 1

    def end(self, labels: CallLabels, code: str, took_s: float) -> None:
        """Count the end of a call."""
        key = labels, code
        self._handled[key] = self._handled.get(key, 0) + 1
        histogram = self._handling.get(labels)
        if histogram is None:
            histogram = self._handling[labels] = Histogram(self._bounds)
        histogram.observe(took_s)

    def lines(self) -> Iterator[str]:
        """Its part of the page, which another thread than the one that counts may make."""
        name = "grpc_server_started_total"
        yield head(name, "counter", "Calls started on the server.")
        for labels, count in tuple(self._started.items()):
            yield sample(name, _named(labels), count)
        name = "grpc_server_handled_total"
        yield head(name, "counter", "Calls ended on the server, whatever their outcome.")
        for (labels, code), count in tuple(self._handled.items()):
            yield sample(name, (*_named(labels), ("grpc_code", code)), count)
        name = "grpc_server_handling_seconds"
        yield head(name, "histogram", "Time from the start of a call to its end.")
        for labels, histogram in tuple(self._handling.items()):
            yield from histogram.samples(name, _named(labels))


def head(name: str, kind: str, words: str) -> str:
    """The two lines that introduce a family."""
    return f"# HELP {name} {words}\n# TYPE {name} {kind}\n"


def sample(name: str, labels: Labels, value: float) -> str:
    """One line of the page, its labels by name."""
    inside = ",".join(f'{key}="{text.translate(_ESCAPES)}"' for key, text in sorted(labels))
    return f"{name}{{{inside}}} {float(value)!r}\n" if inside else f"{name} {float(value)!r}\n"


def _named(labels: CallLabels) -> Labels:
    return tuple(zip(_CALL_LABELS, labels, strict=True))
