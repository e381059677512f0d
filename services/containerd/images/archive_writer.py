"""Archives of images, written: an OCI layout that also has the ``manifest.json`` of docker save.

What is to be written is found out first, so that a part that is missing is an error before the
first byte; then files go out by name, the blobs straight from the content store.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from services.common.errors import DataLoss, InvalidArgument
from services.common.frozen import frozen
from services.containerd.content.digest import hasher
from services.containerd.content.labels import DISTRIBUTION_SOURCE
from services.containerd.images.archive import (
    DOCKER_FILE,
    IMAGE_NAME,
    INDEX_FILE,
    LAYOUT_FILE,
    LAYOUT_VERSION,
    REF_NAME,
)
from services.containerd.images.manifest import describe, not_an_image, parse_manifest
from services.containerd.images.media_types import (
    OCI_INDEX,
    is_index,
    is_manifest,
    is_non_distributable,
)
from services.containerd.images.platform import ALL_PLATFORMS
from services.containerd.images.reference import familiar_name, oci_ref_name, parse_familiar_name
from services.containerd.images.tar_stream import END, directory_header, file_header, padding
from services.containerd.images.tree import check_nesting, children, no_platform, suitable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from services.containerd.content.descriptor import Descriptor
    from services.containerd.content.store import ContentReader
    from services.containerd.images.platform import PlatformMatcher


@frozen
class ExportOptions:
    """What of the images goes into an archive.

    Attributes:
        matcher: which platforms.
        all_platforms: every platform; the matcher only says which one ``manifest.json`` has.
        docker: write ``manifest.json``.
        non_distributable: write layers that are not meant to be distributed.
    """

    matcher: PlatformMatcher = ALL_PLATFORMS
    all_platforms: bool = False
    docker: bool = True
    non_distributable: bool = True


@dataclass(slots=True)
class _Plan:
    blobs: dict[str, Descriptor] = field(default_factory=dict)
    entries: list[Descriptor] = field(default_factory=list)
    docker: dict[str, tuple[Descriptor, list[str]]] = field(default_factory=dict)


class ArchiveWriter:
    """Writes images out of the content store."""

    def __init__(self, content: ContentReader) -> None:
        self._content = content

    async def save(
        self,
        namespace: str,
        images: Sequence[tuple[str, Descriptor]],
        options: ExportOptions,
    ) -> AsyncIterator[bytes]:
        """An archive of images, given by name and target.

        Raises:
            NotFound: a part of an image is missing, or there is none for the platform.
            MalformedManifest: a target is no image.
            DataLoss: a blob is damaged.
        """
        plan = _Plan()
        for name, target in images:
            await self._add(namespace, name, target, options, plan)
        documents = {
            LAYOUT_FILE: _dump({"imageLayoutVersion": LAYOUT_VERSION}),
            INDEX_FILE: _dump(
                {
                    "schemaVersion": 2,
                    "mediaType": OCI_INDEX,
                    "manifests": [describe(entry) for entry in plan.entries],
                }
            ),
        }
        if options.docker and plan.docker:
            documents[DOCKER_FILE] = await self._docker(namespace, plan)
        async for piece in self._write(namespace, documents, plan):
            yield piece

    async def _add(
        self,
        namespace: str,
        name: str,
        target: Descriptor,
        options: ExportOptions,
        plan: _Plan,
    ) -> None:
        names = {IMAGE_NAME: name, REF_NAME: oci_ref_name(name)}
        sources = (await self._content.info(namespace, target.digest)).labels
        sources = {k: v for k, v in sources.items() if k.startswith(DISTRIBUTION_SOURCE)}
        plan.entries.append(replace(target, annotations={**target.annotations, **sources, **names}))
        if is_manifest(target.media_type):
            main = target
        elif is_index(target.media_type):
            main = await self._main_manifest(namespace, target, options)
        else:
            raise not_an_image(target)
        await self._collect(namespace, target, options, plan, above=())
        plan.docker.setdefault(main.digest, (main, []))[1].append(name)

    async def _main_manifest(
        self, namespace: str, target: Descriptor, options: ExportOptions
    ) -> Descriptor:
        listed = await children(self._content, namespace, target)
        best = next(
            (child for child in suitable(listed, options.matcher) if is_manifest(child.media_type)),
            None,
        )
        if best is None:
            platforms = [child.platform for child in listed if child.platform is not None]
            raise no_platform(target, options.matcher, platforms)
        return best

    async def _collect(
        self,
        namespace: str,
        descriptor: Descriptor,
        options: ExportOptions,
        plan: _Plan,
        *,
        above: tuple[str, ...],
    ) -> None:
        if descriptor.digest in plan.blobs:
            return
        if is_non_distributable(descriptor.media_type) and not options.non_distributable:
            return
        info = await self._content.info(namespace, descriptor.digest)
        plan.blobs[descriptor.digest] = replace(descriptor, size_bytes=info.size_bytes)
        below: Sequence[Descriptor] = await children(self._content, namespace, descriptor)
        if is_index(descriptor.media_type):
            above = check_nesting(descriptor, above)
            if not options.all_platforms:
                below = suitable(below, options.matcher)
        for child in below:
            await self._collect(namespace, child, options, plan, above=above)

    async def _docker(self, namespace: str, plan: _Plan) -> bytes:
        listed = []
        for manifest, names in plan.docker.values():
            data = await self._content.read(namespace, manifest.digest)
            parsed = parse_manifest(data, manifest.media_type)
            listed.append(
                {
                    "Config": _blob_name(parsed.config.digest),
                    "RepoTags": [_repo_tag(name) for name in names if _repo_tag(name)] or None,
                    "Layers": [_blob_name(layer.digest) for layer in parsed.layers],
                }
            )
        return _dump(listed)

    async def _write(
        self, namespace: str, documents: dict[str, bytes], plan: _Plan
    ) -> AsyncIterator[bytes]:
        files: dict[str, bytes | Descriptor] = dict(documents)
        files |= {_blob_name(digest): blob for digest, blob in plan.blobs.items()}
        directories = {name.rpartition("/")[0] + "/" for name in files if "/" in name}
        for name in sorted([*files, "blobs/", *directories]):
            match files.get(name):
                case None:
                    yield directory_header(name)
                case bytes(data):
                    yield file_header(name, len(data)) + data + padding(len(data))
                case blob:
                    yield file_header(name, blob.size_bytes)
                    async for chunk in self._blob(namespace, blob):
                        yield chunk
                    yield padding(blob.size_bytes)
        yield END

    async def _blob(self, namespace: str, blob: Descriptor) -> AsyncIterator[bytes]:
        digest = hasher(blob.digest)
        async for chunk in self._content.chunks(namespace, blob.digest):
            await asyncio.to_thread(digest.update, chunk)
            yield chunk
        if not blob.digest.endswith(f":{digest.hexdigest()}"):
            raise DataLoss(f"blob {blob.digest} is damaged on the disk: delete and pull it again")


def _blob_name(digest: str) -> str:
    return "blobs/" + digest.replace(":", "/", 1)


def _repo_tag(name: str) -> str:
    """The short form of a name for ``manifest.json``; empty if it has none."""
    try:
        reference = parse_familiar_name(name)
    except InvalidArgument:
        return ""
    return familiar_name(reference) if reference.tag else ""


def _dump(document: object) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()
