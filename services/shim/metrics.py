"""The shim's metrics. Ids are no labels: containerd adds whose page it is when it scrapes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.common.metrics import Counter, Histogram, ServerMetrics, head, sample
from services.shim.stdio.sink import STDERR, STDOUT

if TYPE_CHECKING:
    from collections.abc import Iterator

_BUCKETS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1, 5, 30)
_CALL_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_STREAMS = (STDOUT, STDERR)


class ShimMetrics:
    """All metrics of one shim."""

    def __init__(self) -> None:
        self.server = ServerMetrics(_CALL_BUCKETS)
        self.create_seconds = Histogram(_BUCKETS)
        self.start_seconds = Histogram(_BUCKETS)
        self.exec_seconds = Histogram(_BUCKETS)
        self.zombies_reaped = Counter()
        self.spool_length = Counter()
        self.spool_failures = Counter()
        self.generation = Counter()
        self.registrations = Counter()
        self.registered = Counter()
        self.containers = Counter()
        self.refused_epochs = Counter()
        self._bytes = {stream: Counter() for stream in _STREAMS}
        self._lines = {stream: Counter() for stream in _STREAMS}
        self._dropped = {stream: Counter() for stream in _STREAMS}

    def read(self, stream: str, count: int) -> None:
        """Count bytes of output that were read."""
        self._bytes[stream].inc(count)

    def newlines(self, stream: str, count: int) -> None:
        """Count newlines in the output that was read."""
        self._lines[stream].inc(count)

    def dropped(self, stream: str, count: int) -> None:
        """Count output that is lost."""
        self._dropped[stream].inc(count)

    def page(self) -> bytes:
        """The page in Prometheus' text format."""
        return "".join([*self.server.lines(), *self._own_lines()]).encode()

    def _own_lines(self) -> Iterator[str]:
        for part, histogram, words in (
            ("create", self.create_seconds, "Time to create a container."),
            ("start", self.start_seconds, "Time to start a container."),
            ("exec", self.exec_seconds, "Time to start an exec process."),
        ):
            name = f"theseus_shim_{part}_seconds"
            yield head(name, "histogram", words)
            yield from histogram.samples(name, ())
        for part, streams, words in (
            ("output_bytes", self._bytes, "Output read from processes."),
            ("output_lines", self._lines, "Newlines in the output read from processes."),
            ("dropped_bytes", self._dropped, "Output that neither a log nor a reader has got."),
        ):
            name = f"theseus_shim_{part}_total"
            yield head(name, "counter", words)
            for stream, counter in streams.items():
                yield sample(name, (("stream", stream),), counter.value)
        for part, counter, kind, words in self._plain():
            name = f"theseus_shim_{part}"
            yield head(name, kind, words)
            yield sample(name, (), counter.value)

    def _plain(self) -> tuple[tuple[str, Counter, str, str], ...]:
        return (
            (
                "zombies_reaped",
                self.zombies_reaped,
                "gauge",
                "Orphans of containers that were reaped.",
            ),
            ("spool_length", self.spool_length, "gauge", "Events that are not acknowledged."),
            (
                "spool_write_failures_total",
                self.spool_failures,
                "counter",
                "Events that could be kept in memory only.",
            ),
            ("generation", self.generation, "gauge", "How often the process was re-executed."),
            (
                "registrations_total",
                self.registrations,
                "counter",
                "Registrations with containerd.",
            ),
            ("registered", self.registered, "gauge", "1 while every registration stands."),
            ("containers", self.containers, "gauge", "Containers of this shim."),
            (
                "refused_epochs_total",
                self.refused_epochs,
                "counter",
                "Registrations refused because containerd's epoch was an old one.",
            ),
        )
