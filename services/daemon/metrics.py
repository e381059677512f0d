"""The daemon's figures: ``theseus_daemon_*``."""

from __future__ import annotations

import time
from collections import Counter
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from services.common.metrics import head, sample
from services.daemon.containers.record import State

if TYPE_CHECKING:
    from collections.abc import Iterator

    from services.common.metrics import Registry
    from services.daemon.containers.record import ExitStatus
    from services.daemon.containers.store import ContainerStore

_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class DaemonMetrics:
    """Implements :class:`services.daemon.containers.observer.Observer` for Prometheus."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self._actions = registry.histograms(
            "theseus_daemon_action_seconds",
            "Duration of actions on containers that succeeded.",
            ("action",),
            _BUCKETS,
        )
        self._failures = registry.counters(
            "theseus_daemon_action_failures_total",
            "Actions on containers that failed.",
            ("action",),
        )
        self._starts = registry.counter(
            "theseus_daemon_container_starts_total", "Containers started."
        )
        self._exits = registry.counters(
            "theseus_daemon_container_exits_total",
            "Runs of containers that ended: zero, nonzero, oom or lost.",
            ("outcome",),
        )
        self._seq = registry.gauge(
            "theseus_daemon_journal_seq",
            "Last event of containerd's journal that was dealt with.",
        )
        self._lag = registry.gauge(
            "theseus_daemon_journal_lag_seconds", "Age of the last event when it was dealt with."
        )
        self._connected = registry.gauge(
            "theseus_daemon_containerd_connected", "1 while containerd's journal is followed."
        )
        self._connections = registry.counter(
            "theseus_daemon_containerd_connections_total",
            "How often containerd was found; each but the first is a reconnection.",
        )
        self._resumed = registry.counter(
            "theseus_daemon_attach_resumed_total",
            "Attached sessions that went on after containerd was away.",
        )

    def watch(self, store: ContainerStore) -> None:
        """Count the containers of a store by state whenever the page is made."""
        self.registry.add(partial(_states, store))

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
        return self.registry.page()


def _states(store: ContainerStore) -> Iterator[str]:
    counts = Counter(record.state for record in store.list_all())
    name = "theseus_daemon_containers"
    yield head(name, "gauge", "Containers by state.")
    for state in State:
        yield sample(name, (("state", state.value),), counts[state])
