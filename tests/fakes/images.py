"""Small images to pull, import and unpack: blobs by digest, made in memory."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from dataclasses import dataclass, field
from typing import Any

from services.containerd.content.descriptor import Descriptor, Platform
from services.containerd.content.digest import digest_of
from services.containerd.images import media_types


def layer_tar(files: dict[str, bytes]) -> bytes:
    """An uncompressed layer with some files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            info.mode = 0o644
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


@dataclass
class Blobs:
    """Blobs by digest, and how to describe them."""

    data: dict[str, bytes] = field(default_factory=dict)

    def add(self, data: bytes, media_type: str, **fields: Any) -> Descriptor:
        digest = digest_of(data)
        self.data[digest] = data
        return Descriptor(media_type, digest, len(data), **fields)

    def add_json(self, document: object, media_type: str, **fields: Any) -> Descriptor:
        return self.add(json.dumps(document).encode(), media_type, **fields)


def described(descriptor: Descriptor) -> dict[str, Any]:
    """A descriptor as JSON has it."""
    document: dict[str, Any] = {
        "mediaType": descriptor.media_type,
        "digest": descriptor.digest,
        "size": descriptor.size_bytes,
    }
    if descriptor.annotations:
        document["annotations"] = dict(descriptor.annotations)
    if descriptor.platform is not None:
        document["platform"] = {
            "os": descriptor.platform.os,
            "architecture": descriptor.platform.architecture,
        }
        if descriptor.platform.variant:
            document["platform"]["variant"] = descriptor.platform.variant
    return document


@dataclass(frozen=True)
class BuiltImage:
    """One image in some :class:`Blobs`."""

    manifest: Descriptor
    config: Descriptor
    layers: tuple[Descriptor, ...]
    diff_ids: tuple[str, ...]


def build_image(
    blobs: Blobs,
    layers: list[dict[str, bytes]],
    *,
    platform: Platform | None = None,
    docker: bool = False,
) -> BuiltImage:
    """An image with gzip layers, described the OCI or the Docker way."""
    platform = platform or Platform("linux", "amd64")
    layer_type = media_types.DOCKER_LAYER_GZIP if docker else media_types.OCI_LAYER_GZIP
    tars = [layer_tar(files) for files in layers]
    described_layers = [blobs.add(gzip.compress(tar, mtime=0), layer_type) for tar in tars]
    diff_ids = [digest_of(tar) for tar in tars]
    config = blobs.add_json(
        {
            "os": platform.os,
            "architecture": platform.architecture,
            **({"variant": platform.variant} if platform.variant else {}),
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
            "config": {"Cmd": ["/bin/sh"]},
        },
        media_types.DOCKER_CONFIG if docker else media_types.OCI_CONFIG,
    )
    manifest_type = media_types.DOCKER_MANIFEST if docker else media_types.OCI_MANIFEST
    manifest = blobs.add_json(
        {
            "schemaVersion": 2,
            "mediaType": manifest_type,
            "config": described(config),
            "layers": [described(layer) for layer in described_layers],
        },
        manifest_type,
        platform=platform,
    )
    return BuiltImage(manifest, config, tuple(described_layers), tuple(diff_ids))


def build_index(blobs: Blobs, manifests: list[Descriptor]) -> Descriptor:
    """An index of some manifests."""
    return blobs.add_json(
        {
            "schemaVersion": 2,
            "mediaType": media_types.OCI_INDEX,
            "manifests": [described(manifest) for manifest in manifests],
        },
        media_types.OCI_INDEX,
    )
