"""containerd's stores on a real database, without what surrounds them."""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from services.common.database import Database
from services.containerd.containers.local import LocalContainerStore
from services.containerd.events.journal import Journal
from services.containerd.images.local import LocalImageStore
from services.containerd.leases.manager import LeaseManager
from services.containerd.metadata.schema import MIGRATIONS
from services.containerd.namespaces.registry import Namespaces
from services.containerd.rpc.encoding import decode_event, encode_event

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from google.protobuf.message import Message


class RecordedMutations:
    def __init__(self) -> None:
        self.changes = self.deletions = 0

    def changed(self) -> None:
        self.changes += 1

    def deleted(self) -> None:
        self.deletions += 1


@dataclass
class Metadata:
    db: Database
    journal: Journal
    mutations: RecordedMutations = field(default_factory=RecordedMutations)
    collections: list[None] = field(default_factory=list)

    def __post_init__(self) -> None:
        async def collect() -> None:
            self.collections.append(None)

        self.leases = LeaseManager(self.db, mutations=self.mutations)
        self.images = LocalImageStore(
            self.db, self.journal, mutations=self.mutations, collect=collect
        )
        self.containers = LocalContainerStore(self.db, self.journal, mutations=self.mutations)
        self.namespaces = Namespaces(self.db, self.journal)

    async def events(self) -> list[tuple[str, str, Message | None]]:
        """Namespace, topic and message of every event so far."""
        return [
            (entry.namespace, entry.topic, decode_event(entry.event))
            async for entry in self.journal.read(follow=False)
        ]

    async def topics(self) -> list[str]:
        return [topic for _, topic, _ in await self.events()]


@asynccontextmanager
async def open_metadata(directory: Path) -> AsyncIterator[Metadata]:
    """Open the database below ``directory``, and close it at the end."""
    db = Database(directory / "meta.db")
    db.open(MIGRATIONS)
    journal = Journal(db, encode_event)
    journal.attach()
    try:
        yield Metadata(db, journal)
    finally:
        db.close()
