"""Indexes, manifests and configurations: reading them without trusting them.

All three are JSON; OCI's image-spec v1 and Docker's schema 2 differ in their media types only. How
they make up a tree is :mod:`services.containerd.images.tree`'s business.
"""

from __future__ import annotations

import json
from dataclasses import field
from typing import TYPE_CHECKING, Any

from services.common.errors import InvalidArgument
from services.common.frozen import frozen
from services.containerd.content.descriptor import Descriptor, Platform
from services.containerd.content.digest import split_digest
from services.containerd.images.media_types import is_index, is_manifest, is_schema_1
from services.containerd.images.platform import normalize

if TYPE_CHECKING:
    from collections.abc import Mapping

_ENTRIES_MAX = 10_000
_SIZE_MAX = 1 << 62
_SCHEMA_1_REFUSED = (
    "the image has a manifest of Docker's schema 1, which is not supported: "
    "build or push it again with a current tool"
)


class MalformedManifest(InvalidArgument):
    """An index, a manifest or a configuration is not what it should be."""


@frozen
class Manifest:
    """One image: its configuration and its layers, lowest first; or any other artifact.

    ``subject`` is the manifest that it refers to, if it is about another one; ``artifact_type`` is
    what it says it is, or the type of its configuration.
    """

    config: Descriptor
    layers: tuple[Descriptor, ...]
    media_type: str = ""
    annotations: Mapping[str, str] = field(default_factory=dict)
    subject: Descriptor | None = None
    artifact_type: str = ""


@frozen
class ImageConfig:
    """What the engine itself needs of a configuration.

    Attributes:
        platform: what the image is for, canonical.
        diff_ids: digests of the uncompressed layers, lowest first.
    """

    platform: Platform
    diff_ids: tuple[str, ...]


def parse_index(data: bytes, media_type: str) -> tuple[Descriptor, ...]:
    """The entries of an index, in its order.

    Raises:
        MalformedManifest: it is something else, or an entry of it is broken.
    """
    document = _document(data, media_type)
    if "config" in document or "layers" in document or is_manifest(document.get("mediaType", "")):
        raise MalformedManifest(f"a manifest was found where an index ({media_type}) should be")
    return _descriptors(document, "manifests")


def parse_manifest(data: bytes, media_type: str) -> Manifest:
    """A manifest.

    Raises:
        MalformedManifest: it is something else, or a part of it is broken.
    """
    document = _document(data, media_type)
    if "manifests" in document or is_index(document.get("mediaType", "")):
        raise MalformedManifest(f"an index was found where a manifest ({media_type}) should be")
    config = document.get("config")
    if config is None:
        raise MalformedManifest(f"the manifest ({media_type}) has no config")
    subject = document.get("subject")
    return Manifest(
        config=_descriptor(config, "config"),
        layers=_descriptors(document, "layers"),
        media_type=media_type,
        annotations=_string_map(document.get("annotations"), "annotations"),
        subject=None if subject is None else _descriptor(subject, "subject"),
        artifact_type=_string(document, "artifactType") or _media_type(config),
    )


def parse_config(data: bytes) -> ImageConfig:
    """The platform and the diff ids of a configuration.

    Raises:
        MalformedManifest: it is no configuration of an image.
    """
    document = _object(data, "configuration")
    root = document.get("rootfs") or {}
    if not isinstance(root, dict) or root.get("type", "layers") != "layers":
        raise MalformedManifest("the configuration's rootfs is not of the type 'layers'")
    diff_ids = root.get("diff_ids") or []
    if not isinstance(diff_ids, list) or len(diff_ids) > _ENTRIES_MAX:
        raise MalformedManifest("the configuration's rootfs.diff_ids is not a list of digests")
    return ImageConfig(
        platform=normalize(_platform(document, "configuration")),
        diff_ids=tuple(_digest(item, "rootfs.diff_ids") for item in diff_ids),
    )


def describe(descriptor: Descriptor) -> dict[str, Any]:
    """A descriptor as JSON has it; what is empty is left out."""
    document: dict[str, Any] = {
        "mediaType": descriptor.media_type,
        "digest": descriptor.digest,
        "size": descriptor.size_bytes,
    }
    if descriptor.artifact_type:
        document["artifactType"] = descriptor.artifact_type
    if descriptor.urls:
        document["urls"] = list(descriptor.urls)
    if descriptor.annotations:
        document["annotations"] = dict(descriptor.annotations)
    if (platform := descriptor.platform) is not None:
        document["platform"] = {"architecture": platform.architecture, "os": platform.os}
        extra = {
            "os.version": platform.os_version,
            "os.features": list(platform.os_features),
            "variant": platform.variant,
        }
        document["platform"] |= {key: value for key, value in extra.items() if value}
    return document


def not_an_image(descriptor: Descriptor) -> MalformedManifest:
    """The error that something else was found where an index or a manifest should be."""
    if is_schema_1(descriptor.media_type):
        return MalformedManifest(_SCHEMA_1_REFUSED)
    return MalformedManifest(
        f"{descriptor.digest} is of the type {descriptor.media_type or 'unknown'!r}, "
        "neither an index nor a manifest of an image"
    )


def _document(data: bytes, media_type: str) -> dict[str, Any]:
    document = _object(data, media_type)
    if "fsLayers" in document:
        raise MalformedManifest(_SCHEMA_1_REFUSED)
    if not isinstance(document.get("mediaType", ""), str):
        raise MalformedManifest(f"mediaType of the {media_type} is not a string")
    return document


def _object(data: bytes, what: str) -> dict[str, Any]:
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise MalformedManifest(f"the {what} is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise MalformedManifest(f"the {what} is not a JSON object")
    return document


def _string(document: Mapping[str, Any], key: str) -> str:
    value = document.get(key) or ""
    if not isinstance(value, str):
        raise MalformedManifest(f"{key} is not a string")
    return value


def _media_type(config: Any) -> str:
    return _string(config, "mediaType") if isinstance(config, dict) else ""


def _descriptors(document: Mapping[str, Any], key: str) -> tuple[Descriptor, ...]:
    items = document.get(key)
    if items is None:
        return ()
    if not isinstance(items, list):
        raise MalformedManifest(f"{key} is not a list")
    if len(items) > _ENTRIES_MAX:
        raise MalformedManifest(f"{key} has {len(items)} entries, more than {_ENTRIES_MAX}")
    return tuple(_descriptor(item, f"{key}[{place}]") for place, item in enumerate(items))


def _descriptor(item: Any, where: str) -> Descriptor:
    if not isinstance(item, dict):
        raise MalformedManifest(f"{where} is not a descriptor")
    size = item.get("size")
    if type(size) is not int or not 0 <= size <= _SIZE_MAX:
        raise MalformedManifest(f"{where}.size is not a size in bytes")
    media_type = item.get("mediaType", "")
    if not isinstance(media_type, str):
        raise MalformedManifest(f"{where}.mediaType is not a string")
    artifact_type = item.get("artifactType") or ""
    if not isinstance(artifact_type, str):
        raise MalformedManifest(f"{where}.artifactType is not a string")
    urls = item.get("urls") or []
    if not isinstance(urls, list) or not all(isinstance(url, str) for url in urls):
        raise MalformedManifest(f"{where}.urls is not a list of URLs")
    platform = item.get("platform")
    return Descriptor(
        media_type=media_type,
        digest=_digest(item.get("digest"), f"{where}.digest"),
        size_bytes=size,
        annotations=_string_map(item.get("annotations"), f"{where}.annotations"),
        urls=tuple(urls),
        platform=None if platform is None else _platform(platform, f"{where}.platform"),
        artifact_type=artifact_type,
    )


def _platform(item: Any, where: str) -> Platform:
    if not isinstance(item, dict):
        raise MalformedManifest(f"{where} is not a platform")
    values = [item.get(key) or "" for key in ("os", "architecture", "variant", "os.version")]
    features = item.get("os.features") or []
    if not isinstance(features, list) or not all(isinstance(v, str) for v in [*values, *features]):
        raise MalformedManifest(f"{where} has a part that is not a string")
    system, architecture, variant, version = values
    return Platform(system, architecture, variant, version, tuple(features))


def _string_map(item: Any, where: str) -> dict[str, str]:
    if item is None:
        return {}
    if not isinstance(item, dict) or not all(isinstance(value, str) for value in item.values()):
        raise MalformedManifest(f"{where} is not a map of strings")
    return item


def _digest(item: Any, where: str) -> str:
    if not isinstance(item, str):
        raise MalformedManifest(f"{where} is not a digest")
    try:
        split_digest(item)
    except InvalidArgument as error:
        raise MalformedManifest(f"{where}: {error.message}") from None
    return item
