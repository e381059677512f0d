"""The descriptor: how everything in an image names a blob (OCI image-spec, descriptor.md)."""

from __future__ import annotations

from dataclasses import field
from typing import TYPE_CHECKING

from services.common.frozen import frozen

if TYPE_CHECKING:
    from collections.abc import Mapping


@frozen
class Platform:
    """What a program runs on, in the words of Go's GOOS and GOARCH."""

    os: str
    architecture: str
    variant: str = ""
    os_version: str = ""
    os_features: tuple[str, ...] = ()


@frozen
class Descriptor:
    """What a blob is, which bytes it has, and how many.

    Attributes:
        media_type: what the bytes are.
        digest: ``<algorithm>:<hex>`` of the bytes.
        size_bytes: their number; 0 where it is not known.
        annotations: of this reference, not of the blob.
        urls: further places to fetch the blob from.
        platform: in an index, what the image is for.
        artifact_type: in a list of referrers, what each is.
    """

    media_type: str
    digest: str
    size_bytes: int
    annotations: Mapping[str, str] = field(default_factory=dict)
    urls: tuple[str, ...] = ()
    platform: Platform | None = None
    artifact_type: str = ""
