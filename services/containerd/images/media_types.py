"""Media types of the parts of an image, those of OCI and those of Docker's schema 2."""

from __future__ import annotations

OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
OCI_LAYER_GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"
OCI_LAYER_ZSTD = "application/vnd.oci.image.layer.v1.tar+zstd"

DOCKER_INDEX = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar"
DOCKER_LAYER_GZIP = "application/vnd.docker.image.rootfs.diff.tar.gzip"
DOCKER_LAYER_ZSTD = "application/vnd.docker.image.rootfs.diff.tar.zstd"

OCTET_STREAM = "application/octet-stream"
"""What a registry calls a blob, and old clients called a configuration."""

ACCEPTED = (DOCKER_MANIFEST, DOCKER_INDEX, OCI_MANIFEST, OCI_INDEX)
"""What may be asked for by name."""

_SCHEMA_1 = frozenset(
    {
        "application/vnd.docker.distribution.manifest.v1+json",
        "application/vnd.docker.distribution.manifest.v1+prettyjws",
    }
)
_LAYER_PREFIXES = (
    "application/vnd.oci.image.layer.",
    "application/vnd.docker.image.rootfs.",
)
_NON_DISTRIBUTABLE_PREFIXES = (
    "application/vnd.oci.image.layer.nondistributable.",
    "application/vnd.docker.image.rootfs.foreign.",
)


def is_index(media_type: str) -> bool:
    """Whether it is a list of manifests."""
    return media_type in (OCI_INDEX, DOCKER_INDEX)


def is_manifest(media_type: str) -> bool:
    """Whether it is the manifest of one image."""
    return media_type in (OCI_MANIFEST, DOCKER_MANIFEST)


def is_config(media_type: str) -> bool:
    """Whether it is the configuration of an image."""
    return media_type in (OCI_CONFIG, DOCKER_CONFIG)


def is_layer(media_type: str) -> bool:
    """Whether it is a layer, compressed or not, to be distributed or not."""
    return media_type.startswith(_LAYER_PREFIXES)


def is_non_distributable(media_type: str) -> bool:
    """Whether it is a layer that its maker does not want in other registries or archives."""
    return media_type.startswith(_NON_DISTRIBUTABLE_PREFIXES)


def is_schema_1(media_type: str) -> bool:
    """Whether it is a manifest as Docker had it before 2016, which nothing here reads."""
    return media_type in _SCHEMA_1


def ref_key(media_type: str, digest: str) -> str:
    """The ref of the ingest that fetches a blob, and its name in progress reports."""
    kinds = (
        (is_manifest, "manifest"),
        (is_index, "index"),
        (is_layer, "layer"),
        (is_config, "config"),
    )
    kind = next((name for test, name in kinds if test(media_type)), "unknown")
    return f"{kind}-{digest}"
