"""The collector: marks what is referred to, and sweeps the rest, in one transaction.

Rows go first, files after them, so that a crash in between leaves files without rows, which the
next start takes away. While rows and files of blobs go, the collector holds the GcLock alone;
directories of snapshots have no such need and are removed afterwards.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Protocol

import structlog

from services.common.errors import NotFound, TheseusError
from services.common.frozen import frozen
from services.containerd.gc.graph import LEASES, Graph, Node
from services.containerd.leases.lease import CONTENT, IMAGES, INGESTS, SNAPSHOTS_PREFIX
from services.containerd.metadata import content, images, leases, references
from services.containerd.uninterrupted import uninterrupted

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Iterable, Mapping

    from services.common.database import Database
    from services.containerd.events.sink import EventSink
    from services.containerd.gc.lock import GcLock

log = structlog.get_logger(__name__)


class CollectedContent(Protocol):
    """What the collector asks of the content store."""

    async def release(self, digests: Iterable[str]) -> int:
        """Remove the files of blobs that no namespace has any more; returns the bytes freed."""

    async def abort(self, namespace: str, ref: str) -> None:
        """Throw an ingest away."""


class CollectedSnapshots(Protocol):
    """What the collector asks of a snapshotter."""

    async def cleanup(self) -> None:
        """Remove the files of snapshots that have no row any more."""


@frozen
class Collection:
    """What a collection did; for ``pause_s`` of its ``seconds`` others may have waited for it."""

    removed: tuple[Node, ...]
    freed_bytes: int
    seconds: float
    pause_s: float


class Collector:
    """Collects garbage. One collection runs at a time.

    Args:
        db: the open database.
        events: where the removal of images and snapshots is told.
        lock: kept from those who put files in place.
        content: the content store.
        snapshotters: by name.
        trace: called with the name of each step that a crash may follow, for tests.
    """

    def __init__(
        self,
        db: Database,
        events: EventSink,
        lock: GcLock,
        *,
        content: CollectedContent,
        snapshotters: Mapping[str, CollectedSnapshots],
        trace: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._db = db
        self._events = events
        self._lock = lock
        self._content = content
        self._snapshotters = snapshotters
        self._trace = trace
        self._one_at_a_time = asyncio.Lock()
        self._unclean: set[str] = set()  # snapshotters that have something to remove

    async def collect(self) -> Collection:
        """Remove everything that nothing refers to now; returns when its files are gone too."""
        return await uninterrupted(self._collect())

    async def _collect(self) -> Collection:
        async with self._one_at_a_time:
            began = time.perf_counter()
            # Mostly there is nothing, and nobody who writes has to wait while that is found out.
            # What becomes garbage after this look asks for a collection of its own.
            if not self._unclean and not await self._db.read(_unreachable):
                seconds = time.perf_counter() - began
                return Collection((), 0, seconds, seconds)
            looked_s = time.perf_counter() - began
            async with self._lock.exclusive():
                alone_since = time.perf_counter()
                removed = await self._db.write(self._sweep)
                self._trace("swept")
                freed_bytes = await self._content.release(
                    dict.fromkeys(node.id for node in removed if node.type == CONTENT)
                )
                pause_s = looked_s + time.perf_counter() - alone_since
            self._trace("blobs collected")
            for node in removed:
                if node.type == INGESTS:
                    await self._abort(node)
            self._trace("ingests collected")
            self._unclean |= {
                node.type.removeprefix(SNAPSHOTS_PREFIX)
                for node in removed
                if node.type.startswith(SNAPSHOTS_PREFIX)
            }
            for name in sorted(self._unclean):
                await self._clean(name)
            seconds = time.perf_counter() - began
        if removed:
            log.info(
                "garbage collected",
                removed=len(removed),
                freed_bytes=freed_bytes,
                seconds=round(seconds, 3),
            )
        return Collection(tuple(removed), freed_bytes, seconds, pause_s)

    def _sweep(self, tx: sqlite3.Connection) -> list[Node]:
        removed = _unreachable(tx)
        for node in removed:
            if node.type == CONTENT:
                content.delete(tx, node.namespace, node.id)
            elif node.type == LEASES:
                leases.delete(tx, node.namespace, node.id)
            elif node.type == IMAGES:
                self._delete_image(tx, node)
            elif node.type.startswith(SNAPSHOTS_PREFIX):
                self._delete_snapshot(tx, node)
        return removed

    def _delete_image(self, tx: sqlite3.Connection, node: Node) -> None:
        images.delete(tx, node.namespace, node.id)
        self._events.append(
            tx,
            node.namespace,
            "/images/delete",
            "containerd.services.images.v1.ImageDelete",
            {"name": node.id},
        )

    def _delete_snapshot(self, tx: sqlite3.Connection, node: Node) -> None:
        snapshotter = node.type.removeprefix(SNAPSHOTS_PREFIX)
        references.delete_snapshot(tx, node.namespace, snapshotter, node.id)
        self._events.append(
            tx,
            node.namespace,
            "/snapshot/remove",
            "containerd.events.SnapshotRemove",
            {"key": node.id, "snapshotter": snapshotter},
        )

    async def _clean(self, name: str) -> None:
        """Have a snapshotter remove files without a row; one that fails is asked again."""
        try:
            if name in self._snapshotters:
                await self._snapshotters[name].cleanup()
        except TheseusError as error:
            log.warning("not cleaned up", snapshotter=name, reason=error.message)
        else:
            self._unclean.discard(name)

    async def _abort(self, node: Node) -> None:
        try:
            await self._content.abort(node.namespace, node.id)
        except NotFound:
            log.debug("ingest ended by itself", ref=node.id, namespace=node.namespace)


def _unreachable(tx: sqlite3.Connection) -> list[Node]:
    return Graph(tx, now_ns=time.time_ns()).unreachable()
