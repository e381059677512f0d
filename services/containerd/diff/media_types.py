"""Media types of layers (OCI image-spec, media-types.md, and what Docker's registries have)."""

from __future__ import annotations

OCI_TAR = "application/vnd.oci.image.layer.v1.tar"
OCI_GZIP = f"{OCI_TAR}+gzip"
OCI_ZSTD = f"{OCI_TAR}+zstd"

_UNCOMPRESSED = (
    OCI_TAR,
    "application/vnd.oci.image.layer.nondistributable.v1.tar",
    "application/vnd.docker.image.rootfs.diff.tar",
    "application/vnd.docker.image.rootfs.foreign.diff.tar",
)
_SUFFIXES = ("", "+gzip", "+zstd", ".gzip", ".zstd")
LAYERS = frozenset(base + suffix for base in _UNCOMPRESSED for suffix in _SUFFIXES)


def is_layer(media_type: str) -> bool:
    """Whether a blob of that type is a layer that can be unpacked; parameters are passed over."""
    return media_type.partition(";")[0].strip() in LAYERS
