"""What a lease is, and how whoever makes content or snapshots puts them under one.

The collector takes what nothing refers to. Between the making of a blob and the image that refers
to it, a lease refers to it. A resource joins a lease in the transaction that makes the resource:

    async with leases.hold(namespace) as lease:     # current_lease is lease.id inside
        ...                                         # what is made here joins it by itself

    lease_id = current_lease.get()                  # before db.write: its thread has other context
    def commit(tx):
        content.insert(tx, ...)
        add_resource(tx, namespace, lease_id, CONTENT, digest)

A client holds a lease of its own by the ``containerd-lease`` key of a request's metadata, which
sets ``current_lease`` for that request.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import field
from typing import TYPE_CHECKING, Protocol

from services.common.frozen import frozen
from services.containerd.metadata.leases import add_resource

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from contextlib import AbstractAsyncContextManager

__all__ = [
    "CONTENT",
    "EXPIRE_LABEL",
    "FLAT_LABEL",
    "IMAGES",
    "INGESTS",
    "Lease",
    "Leases",
    "Resource",
    "add_resource",
    "current_lease",
    "snapshots_type",
]

CONTENT = "content"
INGESTS = "ingests"
IMAGES = "images"
SNAPSHOTS_PREFIX = "snapshots/"

EXPIRE_LABEL = "containerd.io/gc.expire"
"""Time (RFC 3339) after which a lease no longer counts; the next collection removes it."""

FLAT_LABEL = "containerd.io/gc.flat"
"""A lease that has it keeps its resources, but not what these refer to."""

EPOCH_LABEL = "theseus.io/epoch"
"""On a lease that one call holds: which start of containerd the call belonged to."""

current_lease: ContextVar[str] = ContextVar("current_lease", default="")
"""Id of the lease that new resources join; empty: none."""


def snapshots_type(snapshotter: str) -> str:
    """The resource type of a snapshotter's snapshots."""
    return SNAPSHOTS_PREFIX + snapshotter


@frozen
class Lease:
    """What is recorded of a lease."""

    id: str
    labels: Mapping[str, str] = field(default_factory=dict)
    created_at_ns: int = 0


@frozen
class Resource:
    """Something that a lease keeps.

    Attributes:
        type: ``content``, ``ingests``, ``images`` or ``snapshots/<snapshotter>``.
        id: a digest, a ref, a name, or a snapshot's key.
    """

    type: str
    id: str


class Leases(Protocol):
    """Keeps leases. Every method is safe to call concurrently."""

    def hold(
        self, namespace: str, *, expires_s: float = 24 * 3600
    ) -> AbstractAsyncContextManager[Lease]:
        """Make a lease, and ``current_lease`` of what runs inside; remove it at the end.

        Inside a lease that is current already, that one is used and stays. What a process that dies
        leaves is dropped by the next.
        """

    async def create(
        self, namespace: str, lease_id: str = "", labels: Mapping[str, str] | None = None
    ) -> Lease:
        """Make a lease; an empty id makes one up.

        Raises:
            AlreadyExists: the id is taken.
            InvalidArgument: the id or a label is malformed.
        """

    async def delete(self, namespace: str, lease_id: str) -> None:
        """Remove a lease; what it kept alone is garbage now.

        Raises:
            NotFound: there is none of that id.
        """

    async def find(self, namespace: str, filters: Sequence[str] = ()) -> list[Lease]:
        """Leases that match any of the filters, by id; all if there are none."""

    async def add(self, namespace: str, lease_id: str, resource: Resource) -> None:
        """Put a resource under a lease, whether it exists or not.

        Raises:
            NotFound: there is no such lease.
            Unimplemented: leases do not keep resources of that type.
        """

    async def remove(self, namespace: str, lease_id: str, resource: Resource) -> None:
        """Take a resource from a lease; one that is not there is none the less gone.

        Raises:
            NotFound: there is no such lease.
        """

    async def resources(self, namespace: str, lease_id: str) -> list[Resource]:
        """What a lease keeps.

        Raises:
            NotFound: there is no such lease.
        """
