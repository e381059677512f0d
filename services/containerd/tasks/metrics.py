"""What is counted about shims, in Prometheus' terms."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from services.common.metrics import Registry


class TaskMetrics:
    """Counters of the tasks' part of containerd; labels are bounded."""

    def __init__(self, registry: Registry) -> None:
        self.settled = registry.counters(
            "theseus_containerd_shims_settled_total",
            "Shims whose fate was settled: registered or adopted after containerd's start, gone "
            "(dead and buried), void (of another boot), removed (without a task).",
            ("outcome",),
        )
        self.registrations = registry.counter(
            "theseus_containerd_shim_registrations_total",
            "Registration streams that shims opened.",
        )
        self.known = registry.gauges(
            "theseus_containerd_shims",
            "Shims that containerd knows, by how they stand.",
            ("standing",),
        )
        self.unanswered = registry.counter(
            "theseus_containerd_shim_scrapes_unanswered_total",
            "Shims that did not give their metrics in time.",
        )
        self.start_seconds = registry.histogram(
            "theseus_containerd_shim_start_seconds",
            "Time from the request for a shim until it can be called.",
        )
