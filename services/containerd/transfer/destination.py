"""The image store as a transfer's destination: which parts of an image, under which names."""

from __future__ import annotations

from dataclasses import field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from services.common.errors import NotFound
from services.common.frozen import frozen
from services.containerd.images.archive import IMAGE_NAME, REF_NAME
from services.containerd.images.media_types import is_index
from services.containerd.images.platform import ALL_PLATFORMS, ordered
from services.containerd.images.store import Image
from services.containerd.images.tree import no_platform, suitable
from services.containerd.leases.lease import EXPIRE_LABEL

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from services.containerd.content.descriptor import Descriptor, Platform
    from services.containerd.images.platform import PlatformMatcher
    from services.containerd.images.store import ImageStore

BACK_REFERENCE = "containerd.io/gc.bref.image"
"""Label of an image that goes with another one."""


@frozen
class ExtraName:
    """A further name, or the beginning of names: the contract's ``ImageReference``."""

    name: str
    is_prefix: bool = False
    allow_overwrite: bool = False
    add_digest: bool = False
    skip_named_digest: bool = False


@frozen
class Unpacking:
    """What to unpack: a platform (None: the host's) into a snapshotter (empty: the default)."""

    platform: Platform | None = None
    snapshotter: str = ""


@frozen
class Destination:
    """What of an image is stored, and under which names.

    Attributes:
        name: of the image; empty: only ``extra_names`` count.
        labels: of the image.
        platforms: whose content is transferred; empty: all.
        all_metadata: keep manifests and configurations of other platforms too, and what refers to
            the image.
        manifest_limit: most manifests of an index, best first; 0: no limit.
        extra_names: beside ``name``.
        unpackings: what becomes snapshots.
    """

    name: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    platforms: tuple[Platform, ...] = ()
    all_metadata: bool = False
    manifest_limit: int = 0
    extra_names: tuple[ExtraName, ...] = ()
    unpackings: tuple[Unpacking, ...] = ()

    @property
    def matcher(self) -> PlatformMatcher:
        """Ranks the platforms."""
        return ordered(self.platforms) if self.platforms else ALL_PLATFORMS

    def select(
        self, parent: Descriptor, children: Sequence[Descriptor]
    ) -> list[tuple[Descriptor, bool]]:
        """Which children of an index are transferred, best first, and which of them with layers.

        Raises:
            NotFound: there are some, and none is for these platforms.
        """
        if not is_index(parent.media_type):
            return [(child, True) for child in children]
        wanted = suitable(children, self.matcher)
        if self.manifest_limit:
            wanted = wanted[: self.manifest_limit]
        if children and not wanted:
            platforms = [child.platform for child in children if child.platform is not None]
            raise no_platform(parent, self.matcher, platforms)
        chosen = [(child, True) for child in wanted]
        if self.all_metadata:
            digests = {child.digest for child in wanted}
            chosen += [(child, False) for child in children if child.digest not in digests]
        return chosen

    def images(self, target: Descriptor) -> list[Image]:
        """The records to make of what was pulled, or of a whole archive."""
        target = replace(target, platform=None)
        images = [Image(self.name, target, self.labels)] if self.name else []
        for extra in self.extra_names:
            if extra.add_digest:
                images.append(self._extra(f"{extra.name}@{target.digest}", target))
            elif not extra.is_prefix:
                images.append(self._extra(extra.name, target))
        return images

    def images_of_entry(self, entry: Descriptor) -> list[Image]:
        """The records to make of one entry of an archive, by its annotations and our prefixes."""
        target = replace(entry, platform=None)
        images = []
        for extra in self.extra_names:
            if not extra.is_prefix:
                continue
            name = _annotated_name(entry.annotations, extra)
            if name:
                images.append(self._extra(name, target))
            if extra.add_digest and not (name and extra.skip_named_digest):
                images.append(self._extra(f"{extra.name}@{target.digest}", target))
        return images

    def _extra(self, name: str, target: Descriptor) -> Image:
        labels = dict(self.labels)
        if self.name:  # it lives as long as the image that it belongs to
            labels[BACK_REFERENCE] = self.name
            labels[EXPIRE_LABEL] = datetime.now(UTC).isoformat(timespec="seconds")
        return Image(name, target, labels)


async def record(store: ImageStore, namespace: str, images: Sequence[Image]) -> list[Image]:
    """Put images into the store, whether their names are taken or not.

    Raises:
        NotFound: there are none.
    """
    if not images:
        raise NotFound("no name was found for the image: give one")
    return [await store.put(namespace, image) for image in images]


def _annotated_name(annotations: Mapping[str, str], extra: ExtraName) -> str:
    if name := annotations.get(IMAGE_NAME, ""):
        return name if _allowed(name, extra) and _is_full(name) else ""
    name = annotations.get(REF_NAME, "")
    if not name or not extra.name:
        return ""
    if _is_full(name):
        return name if _allowed(name, extra) else ""
    return f"{extra.name}:{name}"


def _is_full(name: str) -> bool:
    return any(character in name for character in "/:@")


def _allowed(name: str, extra: ExtraName) -> bool:
    """Whether a full name may stand: it has the prefix, up to a whole part, or need not."""
    if not extra.name:
        return False
    return extra.allow_overwrite or begins_with(name, extra.name)


def begins_with(name: str, prefix: str) -> bool:
    """Whether a name has a prefix that ends where a part of it does: ``a/b`` of ``a/b:1``."""
    rest = name.removeprefix(prefix) if prefix else name
    return rest != name and (not rest or rest[0] in "/:@")
