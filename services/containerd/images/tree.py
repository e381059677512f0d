"""The tree that an image is: what refers to what, and which branch is for a platform.

index ──▶ manifest ──▶ configuration      an index lists manifests for platforms,
      ├─▶ manifest ─┬▶ layer              or further indexes; a manifest names
      └─▶ index     └▶ layer              a configuration and layers, lowest first
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.common.errors import NotFound
from services.containerd.content.labels import GC_REF_CONTENT
from services.containerd.content.store import MANIFEST_MAX_BYTES
from services.containerd.images.manifest import (
    MalformedManifest,
    not_an_image,
    parse_config,
    parse_index,
    parse_manifest,
)
from services.containerd.images.media_types import (
    is_config,
    is_index,
    is_layer,
    is_manifest,
    is_schema_1,
)
from services.containerd.images.platform import format_platform

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from services.containerd.content.descriptor import Descriptor, Platform
    from services.containerd.content.store import ContentReader
    from services.containerd.images.manifest import Manifest
    from services.containerd.images.platform import PlatformMatcher

MAX_DEPTH = 5
"""How many indexes may be inside each other."""


async def children(
    content: ContentReader, namespace: str, descriptor: Descriptor
) -> tuple[Descriptor, ...]:
    """What a blob refers to: an index's manifests; a manifest's configuration, then its layers.

    Raises:
        NotFound: the namespace does not have that blob.
        ResourceExhausted: it is too large for what it says it is.
        MalformedManifest: it does not parse.
    """
    media_type = descriptor.media_type
    if is_index(media_type):
        return parse_index(await _read(content, namespace, descriptor), media_type)
    if is_manifest(media_type):
        manifest = parse_manifest(await _read(content, namespace, descriptor), media_type)
        return (manifest.config, *manifest.layers)
    if is_schema_1(media_type):
        raise not_an_image(descriptor)
    return ()


async def find_manifest(
    content: ContentReader, namespace: str, target: Descriptor, matcher: PlatformMatcher
) -> tuple[Descriptor, Manifest]:
    """The manifest of an image that suits best.

    An image without an index has one manifest, which is taken whatever it is for.

    Raises:
        NotFound: none suits, or a blob is not there.
        MalformedManifest: what is on the way does not parse, or is no image.
    """
    if is_manifest(target.media_type):
        data = await _read(content, namespace, target)
        return target, parse_manifest(data, target.media_type)
    if not is_index(target.media_type):
        raise not_an_image(target)
    found: list[Platform] = []
    best = await _best(content, namespace, target, matcher=matcher, found=found, above=())
    if best is None:
        raise no_platform(target, matcher, found)
    return best[1], best[2]


def suitable(descriptors: Iterable[Descriptor], matcher: PlatformMatcher) -> list[Descriptor]:
    """The entries of an index that suit, best first; those that name no platform come last."""
    ranked = []
    for place, descriptor in enumerate(descriptors):
        if descriptor.platform is None:
            ranked.append(((1, 0, place), descriptor))
        elif (rank := matcher.rank(descriptor.platform)) is not None:
            ranked.append(((0, rank, place), descriptor))
    return [descriptor for _, descriptor in sorted(ranked, key=lambda pair: pair[0])]


def no_platform(
    target: Descriptor, matcher: PlatformMatcher, found: Iterable[Platform]
) -> NotFound:
    """The error that an image is for other platforms only."""
    names = sorted({format_platform(platform) for platform in found}) or ["none"]
    return NotFound(
        f"image {target.digest} has no manifest for {matcher}; it has: {', '.join(names)}",
        resource=("content", target.digest),
    )


def child_labels(descriptors: Sequence[Descriptor]) -> dict[str, str]:
    """The labels that make a blob keep its children, as clients of containerd expect them.

    ``…config`` for a configuration, ``…m.N`` for manifests, ``…l.N`` for layers, ``…N`` for others.
    """
    counts: dict[str, int] = {}
    labels = {}
    for child in descriptors:
        kind = _label_kind(child.media_type)
        number = counts.get(kind, 0)
        counts[kind] = number + 1
        suffix = "" if kind == "config" and number == 0 else str(number)
        labels[GC_REF_CONTENT + kind + suffix] = child.digest
    return labels


def check_nesting(index: Descriptor, above: tuple[str, ...]) -> tuple[str, ...]:
    """The digests of the indexes down to ``index``, for the check of those inside it.

    Raises:
        MalformedManifest: the index contains itself, or indexes are nested too deep.
    """
    if index.digest in above:
        raise MalformedManifest(f"index {index.digest} contains itself")
    if len(above) >= MAX_DEPTH:
        raise MalformedManifest(
            f"index {index.digest} lies inside {len(above)} others, more than {MAX_DEPTH - 1}"
        )
    return (*above, index.digest)


async def _best(
    content: ContentReader,
    namespace: str,
    index: Descriptor,
    *,
    matcher: PlatformMatcher,
    found: list[Platform],
    above: tuple[str, ...],
) -> tuple[int, Descriptor, Manifest] | None:
    above = check_nesting(index, above)
    best: tuple[int, Descriptor, Manifest] | None = None
    entries = parse_index(await _read(content, namespace, index), index.media_type)
    found.extend(entry.platform for entry in entries if entry.platform is not None)
    for entry in suitable(entries, matcher):
        if best is not None and entry.platform is not None:
            break  # they come by rank, those without one at the end
        if is_index(entry.media_type):
            candidate = await _best(
                content, namespace, entry, matcher=matcher, found=found, above=above
            )
        else:
            candidate = await _candidate(content, namespace, entry, matcher=matcher, found=found)
        if candidate is not None and (best is None or candidate[0] < best[0]):
            best = candidate
    return best


async def _candidate(
    content: ContentReader,
    namespace: str,
    entry: Descriptor,
    *,
    matcher: PlatformMatcher,
    found: list[Platform],
) -> tuple[int, Descriptor, Manifest] | None:
    if not is_manifest(entry.media_type):
        return None
    try:
        manifest = parse_manifest(await _read(content, namespace, entry), entry.media_type)
        platform = entry.platform
        if platform is None:
            if not is_config(manifest.config.media_type):
                return None
            platform = parse_config(await _read(content, namespace, manifest.config)).platform
            found.append(platform)
    except NotFound:
        if entry.platform is None:
            return None  # of an image for several platforms one often has a part only
        raise
    rank = matcher.rank(platform)
    return None if rank is None else (rank, entry, manifest)


async def _read(content: ContentReader, namespace: str, descriptor: Descriptor) -> bytes:
    return await content.read(namespace, descriptor.digest, max_bytes=MANIFEST_MAX_BYTES)


def _label_kind(media_type: str) -> str:
    if is_config(media_type):
        return "config"
    if is_manifest(media_type):
        return "m."
    return "l." if is_layer(media_type) else ""
