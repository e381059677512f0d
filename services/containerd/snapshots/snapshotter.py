"""What a snapshotter is: the terms, the life cycle, and the promises of every implementation.

A snapshot is a state of a file tree. It stands on a parent, or on nothing, and holds what differs
from it; stacked up, the snapshots of an image's layers are its root file system.

    prepare(key, parent) ──▶ ACTIVE ──── commit(name, key) ──▶ COMMITTED ──▶ a parent for others
    view(key, parent) ─────▶ VIEW                              (name)
                               │ remove(key)                     │ remove(name)
                               ▼                                 ▼
                              gone                    gone, when nothing stands on it

* An **active** snapshot can be written through its mounts and committed. A **view** can only be
  read. Neither can be a parent.
* **commit** turns an active snapshot into a committed one: the key is gone, the name is there, and
  the parent stays the same. A committed snapshot never changes again, and has no mounts of its own;
  to look into it, make a view on it.
* Keys and names live in one space: what one has, the other cannot take. Each namespace and each
  snapshotter has a space of its own.
* Nothing mounts anything here. Mounts are data; the caller mounts, unmounts, and does not commit or
  remove a snapshot that it still has mounted for writing.
* Whatever returned is on the disk; a crash between two steps leaves rubbish at worst, which
  ``cleanup`` takes away, and never a row without its files.

Labels beginning with ``containerd.io/snapshot/`` are meant to be handed on from a snapshot to those
made of it by the caller; the others are the caller's own.
"""

from __future__ import annotations

from dataclasses import field
from enum import IntEnum
from typing import TYPE_CHECKING, Protocol

from services.common.errors import InvalidArgument
from services.common.frozen import frozen

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from services.common.mounts import Mount

INHERITED_LABEL_PREFIX = "containerd.io/snapshot/"

REBASE = "rebase"
"""Capability: ``commit`` can put a snapshot on a parent that it was not prepared on."""

REMAP_IDS = "remap-ids"
"""Capability: mounts show the files to the user namespace that labels describe as its own."""


class Kind(IntEnum):
    """What a snapshot is now. The numbers are those of the wire and of the database."""

    UNKNOWN = 0
    VIEW = 1
    ACTIVE = 2
    COMMITTED = 3


@frozen
class SnapshotInfo:
    """What is recorded of a snapshot; ``name`` is the key of one that is not committed."""

    name: str
    kind: Kind
    parent: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    created_at_ns: int = 0
    updated_at_ns: int = 0


@frozen
class Usage:
    """What a snapshot takes on the disk; a file with many links once.

    Its parents are left out, where the snapshot does not hold copies of their files.
    """

    inodes: int = 0
    size_bytes: int = 0


class Snapshotter(Protocol):
    """Makes, keeps and removes snapshots. Every method is safe to call concurrently."""

    @property
    def name(self) -> str:
        """What clients call it, for example ``overlayfs``."""

    @property
    def capabilities(self) -> tuple[str, ...]:
        """What it can do that not every one can: ``rebase``, ``remap-ids``."""

    async def stat(self, namespace: str, key: str) -> SnapshotInfo:
        """What is recorded of a snapshot of any kind.

        Raises:
            NotFound: there is none of that name.
        """

    async def update(
        self,
        namespace: str,
        key: str,
        labels: Mapping[str, str],
        fields: Sequence[str] = (),
    ) -> SnapshotInfo:
        """Change a snapshot's labels, the only part that can change.

        Args:
            namespace: where it is.
            key: which.
            labels: the new values.
            fields: field mask paths: ``labels`` replaces all, ``labels.<name>`` sets that one (and
                removes it where ``labels`` lacks it or has it empty). Empty replaces all.

        Returns:
            The record as it is now.

        Raises:
            NotFound: there is none of that name.
            InvalidArgument: a path names something else.
        """

    async def usage(self, namespace: str, key: str) -> Usage:
        """What a snapshot takes: measured now if it is active, as recorded by commit if not.

        Raises:
            NotFound: there is none of that name.
        """

    async def mounts(self, namespace: str, key: str) -> list[Mount]:
        """The mounts of an active snapshot or a view, the same as it was made with.

        Raises:
            NotFound: there is none of that name.
            FailedPrecondition: it is committed.
        """

    async def prepare(
        self, namespace: str, key: str, parent: str, labels: Mapping[str, str] | None = None
    ) -> list[Mount]:
        """Make an active snapshot on ``parent``, or on nothing if that is empty.

        Returns:
            Its mounts, in the order in which to do them.

        Raises:
            AlreadyExists: the key is taken.
            NotFound: there is no such parent.
            InvalidArgument: the key is empty, or the parent is not committed.
        """

    async def view(
        self, namespace: str, key: str, parent: str, labels: Mapping[str, str] | None = None
    ) -> list[Mount]:
        """Make a read-only snapshot; otherwise as ``prepare``."""

    async def commit(
        self,
        namespace: str,
        name: str,
        key: str,
        labels: Mapping[str, str] | None = None,
        *,
        parent: str = "",
    ) -> None:
        """Make an active snapshot a committed one; its labels are replaced by ``labels``.

        When it returns, all that was written is on the disk and the usage is recorded.

        Args:
            namespace: where it is.
            name: what the committed snapshot is called.
            key: the active snapshot.
            labels: of the committed snapshot.
            parent: puts a snapshot that was prepared on nothing on this one, so that the layers of
                an image can be unpacked in parallel (and each applied through an ``overlay``
                mount that has only an upper directory). Empty: the parent stays. That is for
                snapshotters with the capability ``rebase``.

        Raises:
            NotFound: there is no such key, or no such parent.
            AlreadyExists: the name is taken.
            FailedPrecondition: the snapshot is not active, or the new parent is not committed.
            InvalidArgument: the name is empty, or the snapshot has another parent.
            Unimplemented: it was to be put on a parent, and the snapshotter cannot do that.
        """

    async def remove(self, namespace: str, key: str) -> None:
        """Remove a snapshot. The name is free at once; the disk may be a little later.

        Raises:
            NotFound: there is none of that name.
            FailedPrecondition: others stand on it.
        """

    async def infos(self, namespace: str) -> list[SnapshotInfo]:
        """Every snapshot of the namespace, by age: a parent comes before what stands on it."""

    async def cleanup(self) -> None:
        """Give back the disk space of what was removed, or abandoned by a crash, everywhere."""


def find_configured(snapshotters: Mapping[str, object], name: str) -> str:
    """The name, if it is one of ``snapshotters``.

    Raises:
        InvalidArgument: it is not.
    """
    if name not in snapshotters:
        raise InvalidArgument(
            f"snapshotter {name!r} is not configured: there are {', '.join(sorted(snapshotters))}",
            field="snapshotter",
        )
    return name
