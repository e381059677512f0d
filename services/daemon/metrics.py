"""The daemon's figures: ``theseus_daemon_*``."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from services.daemon.containers.record import State

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from services.daemon.containers.record import ExitStatus
    from services.daemon.containers.store import ContainerStore

_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class DaemonMetrics:
    """Implements :class:`services.daemon.containers.observer.Observer` for Prometheus."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self._actions = Histogram(
            "theseus_daemon_action_seconds",
            "Duration of actions on containers that succeeded.",
            ("action",),
            buckets=_BUCKETS,
            registry=registry,
        )
        self._failures = Counter(
            "theseus_daemon_action_failures",
            "Actions on containers that failed.",
            ("action",),
            registry=registry,
        )
        self._starts = Counter(
            "theseus_daemon_container_starts", "Containers started.", registry=registry
        )
        self._exits = Counter(
            "theseus_daemon_container_exits",
            "Runs of containers that ended: zero, nonzero, oom or lost.",
            ("outcome",),
            registry=registry,
        )
        self._seq = Gauge(
            "theseus_daemon_journal_seq",
            "Last event of containerd's journal that was dealt with.",
            registry=registry,
        )
        self._lag = Gauge(
            "theseus_daemon_journal_lag_seconds",
            "Age of the last event when it was dealt with.",
            registry=registry,
        )
        self._connected = Gauge(
            "theseus_daemon_containerd_connected",
            "1 while containerd's journal is followed.",
            registry=registry,
        )
        self._connections = Counter(
            "theseus_daemon_containerd_connections",
            "How often containerd was found; each but the first is a reconnection.",
            registry=registry,
        )
        self._resumed = Counter(
            "theseus_daemon_attach_resumed",
            "Attached sessions that went on after containerd was away.",
            registry=registry,
        )

    def watch(self, store: ContainerStore) -> None:
        """Count the containers of a store by state whenever the page is made."""
        self.registry.register(_States(store))

    @contextmanager
    def timed(self, action: str) -> Iterator[None]:
        """See the interface."""
        began_s = time.perf_counter()
        try:
            yield
        except BaseException:
            self._failures.labels(action).inc()
            raise
        self._actions.labels(action).observe(time.perf_counter() - began_s)

    def started(self) -> None:
        """See the interface."""
        self._starts.inc()

    def ended(self, status: ExitStatus) -> None:
        """See the interface."""
        if status.lost:
            outcome = "lost"
        elif status.oom_killed:
            outcome = "oom"
        else:
            outcome = "zero" if status.code == 0 else "nonzero"
        self._exits.labels(outcome).inc()

    def journal_read(self, *, seq: int, lag_s: float) -> None:
        """See the interface."""
        self._seq.set(seq)
        self._lag.set(lag_s)

    def connected(self, connected: bool) -> None:
        """See the interface."""
        self._connected.set(1 if connected else 0)
        if connected:
            self._connections.inc()

    def attach_resumed(self) -> None:
        """See the interface."""
        self._resumed.inc()

    async def page(self) -> bytes:
        """All figures in the text exposition format."""
        return generate_latest(self.registry)


class _States(Collector):
    def __init__(self, store: ContainerStore) -> None:
        self._store = store

    def collect(self) -> Iterable[GaugeMetricFamily]:
        counts = dict.fromkeys(State, 0)
        for record in self._store.list_all():
            counts[record.state] += 1
        family = GaugeMetricFamily(
            "theseus_daemon_containers", "Containers by state.", labels=("state",)
        )
        for state, count in counts.items():
            family.add_metric((state.value,), count)
        yield family
