"""What a pull that broke off leaves for the next attempt.

A pull works under a lease of its own, which is labelled with the reference. It ends with the pull,
unless that was interrupted: by a registry that is away, by a client or a containerd that went away
(a process that is killed leaves the lease by itself). Then it keeps what has arrived, whole blobs
and beginnings, for as long as containerd keeps an ingest. The next pull of the same reference that
comes to an end, good or bad, takes these leases with it. One that finds the disk full takes those
of all references: what is there to be gone on with must not keep the room from what is wanted now.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from services.common.errors import NotFound, ResourceExhausted, Unavailable
from services.containerd.leases.lease import EXPIRE_LABEL, INGESTS, current_lease
from services.containerd.uninterrupted import uninterrupted

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from services.containerd.leases.lease import Leases

PULL_LABEL = "theseus.io/pull"
"""On the lease of a pull: the reference."""

INTERRUPTIONS = (Unavailable, TimeoutError, asyncio.CancelledError)
"""What ends a pull that can be gone on with."""

_KEPT_S = 24 * 3600


class PullLeases:
    """Holds the leases of pulls.

    Args:
        leases: where they are.
        discard: throws the ingest of a ref away, unless another pull writes to it.
    """

    def __init__(self, leases: Leases, discard: Callable[[str, str], Awaitable[None]]) -> None:
        self._leases = leases
        self._discard = discard
        self._live: set[tuple[str, str]] = set()

    @asynccontextmanager
    async def hold(self, namespace: str, reference: str) -> AsyncIterator[None]:
        """As :meth:`Leases.hold`, for the pull of a reference."""
        if current_lease.get():
            yield
            return
        expires_at = datetime.fromtimestamp(time.time() + _KEPT_S, UTC)
        labels = {
            EXPIRE_LABEL: expires_at.isoformat(timespec="seconds"),
            PULL_LABEL: reference,
        }
        lease = (await self._leases.create(namespace, labels=labels)).id
        self._live.add((namespace, lease))
        current_lease.set(lease)
        try:
            yield
        except INTERRUPTIONS:
            await uninterrupted(self._interrupted(namespace, lease))
            raise
        except ResourceExhausted:
            await uninterrupted(self._ended(namespace, lease, ""))
            raise
        except BaseException:
            await uninterrupted(self._ended(namespace, lease, reference))
            raise
        else:
            await uninterrupted(self._ended(namespace, lease, reference))
        finally:
            current_lease.set("")
            self._live.discard((namespace, lease))

    async def _interrupted(self, namespace: str, lease: str) -> None:
        with suppress(NotFound):
            if not await self._leases.resources(namespace, lease):
                await self._leases.delete(namespace, lease)

    async def _ended(self, namespace: str, lease: str, reference: str) -> None:
        """Delete a lease, and what earlier pulls left of the same reference; empty: of any."""
        self._live.discard((namespace, lease))
        for found in await self._leases.find(namespace):
            pulled = found.labels.get(PULL_LABEL, "")
            is_earlier = (
                pulled
                and pulled == (reference or pulled)
                and (namespace, found.id) not in self._live
            )
            if found.id == lease or is_earlier:
                with suppress(NotFound):
                    await self._delete(namespace, found.id)

    async def _delete(self, namespace: str, lease: str) -> None:
        for resource in await self._leases.resources(namespace, lease):
            if resource.type == INGESTS:
                await self._discard(namespace, resource.id)
        await self._leases.delete(namespace, lease)
