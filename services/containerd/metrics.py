"""What containerd counts, beside what every gRPC server does and what is counted about shims.

Gauges of what lies in the database are read when a page is asked for.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from services.containerd.metadata import figures

if TYPE_CHECKING:
    from collections.abc import Iterator

    from services.common.database import Database
    from services.containerd.gc.collector import Collection


class ContainerdMetrics:
    """Counters and gauges of the node's content."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.epoch = Gauge(
            "theseus_containerd_epoch",
            "Number of starts on this root, this one included.",
            registry=registry,
        )
        self.start_damage = Gauge(
            "theseus_containerd_start_damage",
            "What the check at the start found missing or changed; 0 after a clean stop.",
            registry=registry,
        )
        self.journal_seq = Gauge(
            "theseus_containerd_journal_seq",
            "Sequence number of the newest event.",
            registry=registry,
        )
        self.content_bytes = Gauge(
            "theseus_containerd_content_bytes", "Bytes of all blobs.", registry=registry
        )
        self.objects = Gauge(
            "theseus_containerd_objects",
            "What is recorded, in all namespaces, by kind.",
            ("kind",),
            registry=registry,
        )
        self.transfers = Histogram(
            "theseus_containerd_transfer_seconds",
            "Time that a pull, load or push took, by outcome (ok, failed).",
            ("kind", "outcome"),
            buckets=(0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 180, 600),
            registry=registry,
        )
        self.gc_seconds = Histogram(
            "theseus_containerd_gc_seconds", "Time that a collection took.", registry=registry
        )
        self.gc_removed = Counter(
            "theseus_containerd_gc_removed",
            "What collections removed, by kind.",
            ("kind",),
            registry=registry,
        )
        self.gc_freed_bytes = Counter(
            "theseus_containerd_gc_freed_bytes",
            "Bytes of blobs that collections gave back.",
            registry=registry,
        )

    @contextmanager
    def timed_transfer(self, kind: str) -> Iterator[None]:
        """Time a transfer."""
        began, outcome = time.perf_counter(), "failed"
        try:
            yield
            outcome = "ok"
        finally:
            self.transfers.labels(kind, outcome).observe(time.perf_counter() - began)

    def observe_collection(self, collection: Collection) -> None:
        """Count a collection."""
        self.gc_seconds.observe(collection.seconds)
        self.gc_freed_bytes.inc(collection.freed_bytes)
        for node in collection.removed:
            self.gc_removed.labels(node.type.partition("/")[0]).inc()

    async def refresh(self, db: Database) -> None:
        """Read the gauges out of the database."""
        found = await db.read(figures.read)
        self.journal_seq.set(found.journal_seq)
        self.content_bytes.set(found.content_bytes)
        for kind, count in found.objects.items():
            self.objects.labels(kind).set(count)


def join_pages(first: bytes, second: bytes) -> bytes:
    """One page out of two in the text format; a family that both have is described once.

    All samples of a family stand together, as the format asks for.
    """
    families: dict[str, list[str]] = {}
    described: set[str] = set()
    for page in (first, second):
        family, before = "", frozenset(described)
        for line in page.decode().splitlines():
            if line.startswith("# "):
                family = line.split(" ", 3)[2]
                if family in before:
                    continue
                described.add(family)
            families.setdefault(family, []).append(line)
    return "".join(f"{line}\n" for lines in families.values() for line in lines).encode()
