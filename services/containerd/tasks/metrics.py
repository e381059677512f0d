"""What is counted about shims, in Prometheus' terms."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


class TaskMetrics:
    """Counters of the tasks' part of containerd; labels are bounded."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.settled = Counter(
            "theseus_containerd_shims_settled",
            "Shims whose fate was settled: registered or adopted after containerd's start, gone "
            "(dead and buried), void (of another boot), removed (without a task).",
            ("outcome",),
            registry=registry,
        )
        self.registrations = Counter(
            "theseus_containerd_shim_registrations",
            "Registration streams that shims opened.",
            registry=registry,
        )
        self.known = Gauge(
            "theseus_containerd_shims",
            "Shims that containerd knows, by how they stand.",
            ("standing",),
            registry=registry,
        )
        self.unanswered = Counter(
            "theseus_containerd_shim_scrapes_unanswered",
            "Shims that did not give their metrics in time.",
            registry=registry,
        )
        self.start_seconds = Histogram(
            "theseus_containerd_shim_start_seconds",
            "Time from the request to the factory to a shim that serves.",
            registry=registry,
        )
