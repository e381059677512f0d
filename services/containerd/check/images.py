"""What images refer to: which blob is of what type, and which layer a snapshot was made of.

Read from the files themselves, as far as they can be: what is missing or damaged ends a branch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from services.common.errors import TheseusError
from services.containerd.check.blobs import blob_path
from services.containerd.content.digest import chain_ids
from services.containerd.content.store import MANIFEST_MAX_BYTES
from services.containerd.images.manifest import parse_config, parse_index, parse_manifest
from services.containerd.images.media_types import is_index, is_manifest

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable
    from pathlib import Path

    from services.containerd.content.descriptor import Descriptor


@dataclass(slots=True)
class ImageMap:
    """What all images refer to.

    Attributes:
        blobs: how each blob is described, by digest.
        layers: what each snapshot of a layer is made of, by its chain id.
    """

    blobs: dict[str, Descriptor] = field(default_factory=dict)
    layers: dict[str, Descriptor] = field(default_factory=dict)


def read_images(root: Path, targets: Iterable[Descriptor], bad: Collection[str]) -> ImageMap:
    """Follow images from their targets on; blobs that are ``bad`` are not opened. Blocks."""
    found = ImageMap()
    waiting = list(targets)
    while waiting:
        descriptor = waiting.pop()
        if descriptor.digest in found.blobs:
            continue
        found.blobs[descriptor.digest] = descriptor
        try:
            waiting += _children(root, descriptor, bad, found)
        except TheseusError:
            continue  # no image; whatever it is, it has its digest
    return found


def _children(
    root: Path, descriptor: Descriptor, bad: Collection[str], found: ImageMap
) -> list[Descriptor]:
    if is_index(descriptor.media_type):
        data = _read(root, descriptor.digest, bad)
        return [] if data is None else list(parse_index(data, descriptor.media_type))
    if not is_manifest(descriptor.media_type):
        return []
    data = _read(root, descriptor.digest, bad)
    if data is None:
        return []
    manifest = parse_manifest(data, descriptor.media_type)
    config = _read(root, manifest.config.digest, bad)
    if config is not None:
        ids = chain_ids(parse_config(config).diff_ids)
        found.layers.update(zip(ids, manifest.layers, strict=False))
    return [manifest.config, *manifest.layers]


def _read(root: Path, digest: str, bad: Collection[str]) -> bytes | None:
    path = blob_path(root, digest)
    if digest in bad or not path.is_file() or path.stat().st_size > MANIFEST_MAX_BYTES:
        return None
    return path.read_bytes()
