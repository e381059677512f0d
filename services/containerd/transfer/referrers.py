"""What refers to an image, pulled along with it: signatures, bills of materials, other artifacts.

A referrer is kept by a label on what it refers to, as clients of containerd expect it:

    subject ── containerd.io/gc.ref.content.referrer.sha256.N ──▶ referrer ──▶ its blobs
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import structlog

from services.containerd.content.labels import GC_REF_CONTENT
from services.containerd.images.manifest import MalformedManifest, parse_manifest
from services.containerd.images.media_types import is_manifest
from services.containerd.images.tree import child_labels
from services.containerd.transfer.labelling import add_labels

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from services.containerd.content.descriptor import Descriptor
    from services.containerd.content.store import ContentStore
    from services.containerd.remotes.remote import Remote
    from services.containerd.transfer.progress import ProgressTracker

log = structlog.get_logger(__name__)

REFERRER_LABEL = f"{GC_REF_CONTENT}referrer.sha256."

_REFERRERS_MAX = 100
"""Anybody who may push can refer to an image; more are passed over."""


class ReferrersPull:
    """The referrers of one image on their way.

    Args:
        content: where they go.
        namespace: whose.
        remote: where they come from.
        tracker: is told.
        obtain: has a blob in the store when it returns.
    """

    def __init__(
        self,
        content: ContentStore,
        namespace: str,
        remote: Remote,
        *,
        tracker: ProgressTracker,
        obtain: Callable[[Descriptor], Awaitable[None]],
    ) -> None:
        self._content = content
        self._namespace = namespace
        self._remote = remote
        self._tracker = tracker
        self._obtain = obtain

    async def fetch(self, subjects: Iterable[Descriptor]) -> None:
        """Have all that refers to these manifests, which are in the store, with all its blobs."""
        async with asyncio.TaskGroup() as group:
            for subject in {each.digest: each for each in subjects}.values():
                group.create_task(self._fetch_all(subject))

    async def _fetch_all(self, subject: Descriptor) -> None:
        found = await self._remote.referrers(subject.digest)
        if len(found) > _REFERRERS_MAX:
            log.warning("referrers are passed over", subject=subject.digest, found=len(found))
            found = found[:_REFERRERS_MAX]
        self._tracker.add_children(subject, found)
        kept = await asyncio.gather(*(self._fetch(subject, each) for each in found))
        labels = {
            f"{REFERRER_LABEL}{number}": referrer.digest
            for number, referrer in enumerate(each for each in kept if each is not None)
        }
        await add_labels(self._content, self._namespace, subject.digest, labels)

    async def _fetch(self, subject: Descriptor, referrer: Descriptor) -> Descriptor | None:
        """A referrer with its blobs; None if it is none of this subject."""
        if not is_manifest(referrer.media_type):
            log.warning("referrer is no manifest", digest=referrer.digest, **_names(subject))
            return None
        await self._obtain(referrer)
        try:
            manifest = parse_manifest(
                await self._content.read(self._namespace, referrer.digest), referrer.media_type
            )
        except MalformedManifest as error:
            log.warning("referrer is malformed", error=error.message, **_names(subject))
            return None
        if manifest.subject is None or manifest.subject.digest != subject.digest:
            log.warning("referrer is of something else", digest=referrer.digest, **_names(subject))
            return None
        below = (manifest.config, *manifest.layers)
        labels = child_labels(below)
        await add_labels(self._content, self._namespace, referrer.digest, labels)
        self._tracker.add_children(referrer, below)
        await asyncio.gather(*map(self._obtain, {each.digest: each for each in below}.values()))
        return referrer


def _names(subject: Descriptor) -> dict[str, str]:
    return {"subject": subject.digest}
