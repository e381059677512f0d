"""The shim's metrics. Ids are no labels: containerd adds whose page it is when it scrapes."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from services.common.metrics import ServerMetrics, render_registry

_BUCKETS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1, 5, 30)


class ShimMetrics:
    """All metrics of one shim, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry(auto_describe=False)
        self.server = ServerMetrics(registry)
        self.create_seconds = Histogram(
            "theseus_shim_create_seconds",
            "Time to create a container.",
            buckets=_BUCKETS,
            registry=registry,
        )
        self.start_seconds = Histogram(
            "theseus_shim_start_seconds",
            "Time to start a container.",
            buckets=_BUCKETS,
            registry=registry,
        )
        self.exec_seconds = Histogram(
            "theseus_shim_exec_seconds",
            "Time to start an exec process.",
            buckets=_BUCKETS,
            registry=registry,
        )
        self._bytes = Counter(
            "theseus_shim_output_bytes",
            "Output read from processes.",
            ("stream",),
            registry=registry,
        )
        self._lines = Counter(
            "theseus_shim_output_lines",
            "Newlines in the output read from processes.",
            ("stream",),
            registry=registry,
        )
        self._dropped = Counter(
            "theseus_shim_dropped_bytes",
            "Output that neither a log nor a reader has got.",
            ("stream",),
            registry=registry,
        )
        self.zombies_reaped = Gauge(
            "theseus_shim_zombies_reaped",
            "Orphans of containers that were reaped.",
            registry=registry,
        )
        self.spool_length = Gauge(
            "theseus_shim_spool_length",
            "Events that are not acknowledged.",
            registry=registry,
        )
        self.spool_failures = Counter(
            "theseus_shim_spool_write_failures",
            "Events that could be kept in memory only.",
            registry=registry,
        )
        self.generation = Gauge(
            "theseus_shim_generation",
            "How often the process was re-executed.",
            registry=registry,
        )
        self.registrations = Counter(
            "theseus_shim_registrations",
            "Registrations with containerd.",
            registry=registry,
        )
        self.registered = Gauge(
            "theseus_shim_registered",
            "1 while the registration stands.",
            registry=registry,
        )
        self.refused_epochs = Counter(
            "theseus_shim_refused_epochs",
            "Registrations refused because containerd's epoch was an old one.",
            registry=registry,
        )

    def read(self, stream: str, data: bytes) -> None:
        """Count output that was read."""
        self._bytes.labels(stream).inc(len(data))
        self._lines.labels(stream).inc(data.count(b"\n"))

    def dropped(self, stream: str, count: int) -> None:
        """Count output that is lost."""
        self._dropped.labels(stream).inc(count)

    def page(self) -> bytes:
        """The page in Prometheus' text format."""
        return render_registry(self.registry)
