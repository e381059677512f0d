"""What containerd counts, beside what every gRPC server does and what is counted about shims.

Gauges of what lies in the database are read when a page is asked for.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from services.containerd.metadata import figures

if TYPE_CHECKING:
    from collections.abc import Iterator

    from services.common.database import Database
    from services.common.metrics import Registry
    from services.containerd.gc.collector import Collection


class ContainerdMetrics:
    """Counters and gauges of the node's content."""

    def __init__(self, registry: Registry) -> None:
        self.epoch = registry.gauge(
            "theseus_containerd_epoch", "Number of starts on this root, this one included."
        )
        self.start_damage = registry.gauge(
            "theseus_containerd_start_damage",
            "What the check at the start found missing or changed; 0 after a clean stop.",
        )
        self.journal_seq = registry.gauge(
            "theseus_containerd_journal_seq", "Sequence number of the newest event."
        )
        self.content_bytes = registry.gauge(
            "theseus_containerd_content_bytes", "Bytes of all blobs."
        )
        self.objects = registry.gauges(
            "theseus_containerd_objects",
            "What is recorded, in all namespaces, by kind.",
            ("kind",),
        )
        self.transfers = registry.histograms(
            "theseus_containerd_transfer_seconds",
            "Time that a pull, load or push took, by outcome (ok, failed).",
            ("kind", "outcome"),
            (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 180, 600),
        )
        self.gc_seconds = registry.histogram(
            "theseus_containerd_gc_seconds", "Time that a collection took."
        )
        self.gc_collections = registry.counters(
            "theseus_containerd_gc_collections_total",
            "Collections of garbage, by outcome (ok, failed).",
            ("outcome",),
        )
        self.gc_removed = registry.counters(
            "theseus_containerd_gc_removed_total", "What collections removed, by kind.", ("kind",)
        )
        self.gc_freed_bytes = registry.counter(
            "theseus_containerd_gc_freed_bytes_total", "Bytes of blobs that collections gave back."
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

    def observe_collection(self, collection: Collection | None) -> None:
        """Count a collection; None: one that failed."""
        self.gc_collections.labels("failed" if collection is None else "ok").inc()
        if collection is None:
            return
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
