"""Progress reports: what a transfer tells its client while it works.

Every blob goes through the same words, as clients of containerd expect them:

    waiting ──▶ downloading … ──▶ complete ──▶ extracting … ──▶ extracted
        └─────▶ already exists                  (a layer that is unpacked)

Between these, a blob under way is reported as often as ``_INTERVAL_S`` if it has moved.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from services.common.frozen import frozen
from services.containerd.images.media_types import ref_key

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable

    from services.containerd.content.descriptor import Descriptor

_INTERVAL_S = 0.3


@frozen
class Progress:
    """One report.

    Attributes:
        event: what happens.
        name: what it happens to: an image, or the ref of a blob; empty: the transfer.
        parents: names that this one belongs to.
        progress: bytes done.
        total: bytes in all; 0: not known.
        descriptor: the blob, if it is about one.
    """

    event: str
    name: str = ""
    parents: tuple[str, ...] = ()
    progress: int = 0
    total: int = 0
    descriptor: Descriptor | None = None


class Report(Protocol):
    """Takes reports in. It does not block, and may drop some of a blob that moves on."""

    def __call__(self, progress: Progress, /) -> None:
        """Report ``progress``."""


def report_nothing(progress: Progress) -> None:
    """Is told, and tells nobody."""


@dataclass(slots=True)
class _Job:
    descriptor: Descriptor
    parents: tuple[str, ...]
    state: str = "waiting"
    position: Callable[[], int] | None = None
    reported: int = 0


class ProgressTracker:
    """The blobs of one transfer.

    Args:
        report: where to.
        root: name of the image, which blobs without a parent belong to.
        moving: what a blob is called that is on its way.
    """

    def __init__(self, report: Report, root: str, *, moving: str = "downloading") -> None:
        self._report = report
        self._root = root
        self._moving = moving
        self._jobs: dict[str, _Job] = {}
        self._parents: dict[str, list[str]] = {}

    def add(self, descriptor: Descriptor) -> None:
        """A blob is wanted."""
        if descriptor.digest not in self._jobs:
            parents = tuple(self._parents.get(descriptor.digest, (self._root,)))
            self._jobs[descriptor.digest] = _Job(descriptor, parents)
            self._tell(descriptor, "waiting", 0)

    def add_children(self, parent: Descriptor, children: Iterable[Descriptor]) -> None:
        """What ``parent`` refers to; to be told before the children are added."""
        name = ref_key(parent.media_type, parent.digest)
        for child in children:
            self._parents.setdefault(child.digest, []).append(name)

    def exists(self, descriptor: Descriptor) -> None:
        """A blob is there already."""
        self._finish(descriptor, "already exists")

    def moves(self, descriptor: Descriptor, position: Callable[[], int]) -> None:
        """A blob is on its way; ``position`` says how far, until the next word about it."""
        self.add(descriptor)
        job = self._jobs[descriptor.digest]
        job.state, job.position, job.reported = self._moving, position, 0

    def completed(self, descriptor: Descriptor) -> None:
        """A blob has arrived."""
        self._finish(descriptor, "complete")

    def extracting(self, descriptor: Descriptor) -> None:
        """A layer is being unpacked."""
        self.add(descriptor)
        self._jobs[descriptor.digest].state = "extracting"
        self._tell(descriptor, "extracting", 0)

    def extracted(self, descriptor: Descriptor) -> None:
        """A layer is unpacked."""
        self._finish(descriptor, "extracted")

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Report, inside the block, what moves."""
        task = asyncio.create_task(self._tick(), name="progress")
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_INTERVAL_S)
            for job in self._jobs.values():
                if job.position is not None and (position := job.position()) > job.reported:
                    job.reported = position
                    self._tell(job.descriptor, job.state, position)

    def _finish(self, descriptor: Descriptor, state: str) -> None:
        self.add(descriptor)
        job = self._jobs[descriptor.digest]
        job.state, job.position = state, None
        self._tell(descriptor, state, descriptor.size_bytes)

    def _tell(self, descriptor: Descriptor, event: str, progress: int) -> None:
        self._report(
            Progress(
                event,
                ref_key(descriptor.media_type, descriptor.digest),
                self._jobs[descriptor.digest].parents,
                progress,
                descriptor.size_bytes,
                descriptor,
            )
        )
