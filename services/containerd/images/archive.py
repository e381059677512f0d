"""Archives of images, read: OCI layouts, and what ``docker save`` writes, old and new.

    oci-layout, index.json, blobs/<algorithm>/<hex>     OCI image-layout
    manifest.json, <id>.json, <id>/layer.tar            docker save; may come together with that

The archive is a stream, so every file that may be a part of an image goes into the content store as
it comes; what it was is known at the end. What then turns out to be nothing is garbage. An OCI
layout is believed first. For the other kind, manifests and an index are made here.
"""

from __future__ import annotations

import json
import posixpath
import re
import secrets
from contextlib import aclosing, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from services.common.errors import (
    AlreadyExists,
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
)
from services.common.frozen import frozen
from services.containerd.content.descriptor import Descriptor
from services.containerd.content.digest import digest_of
from services.containerd.content.labels import UNCOMPRESSED
from services.containerd.content.store import MANIFEST_MAX_BYTES
from services.containerd.images import media_types
from services.containerd.images.decompress import GZIP_MAGIC, ZSTD_MAGIC, decompressed, gzipped
from services.containerd.images.manifest import describe, parse_config, parse_index
from services.containerd.images.reference import oci_ref_name, parse_familiar_name
from services.containerd.images.tar_stream import TarStream

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from services.containerd.content.store import ContentStore
    from services.containerd.images.tar_stream import TarEntry

LAYOUT_FILE = "oci-layout"
INDEX_FILE = "index.json"
DOCKER_FILE = "manifest.json"
LAYOUT_VERSION = "1.0.0"

IMAGE_NAME = "io.containerd.image.name"
"""Annotation of an index's entry: the full name of the image."""

REF_NAME = "org.opencontainers.image.ref.name"
"""Annotation of an index's entry: the tag, or the full name."""

_DOCUMENTS = frozenset({LAYOUT_FILE, INDEX_FILE, DOCKER_FILE})
_BLOB = re.compile(r"blobs/([a-z0-9]+)/([0-9a-f]+)")
# Parts of the format of 2013, which repeat what the configuration says.
_USELESS = re.compile(r"repositories|(?:.*/)?VERSION|.*/json")


@frozen
class ArchiveLimits:
    """Bounds of an archive, uncompressed.

    Attributes:
        entries: files, directories and links.
        total_bytes: of the whole archive.
        document_bytes: of an index or a manifest in it.
        images: listed by ``manifest.json``.
    """

    entries: int = 100_000
    total_bytes: int = 64 << 30
    document_bytes: int = MANIFEST_MAX_BYTES
    images: int = 1_000


class ArchiveReader:
    """Reads archives into the content store."""

    def __init__(self, content: ContentStore, *, limits: ArchiveLimits | None = None) -> None:
        self._content = content
        self._limits = limits or ArchiveLimits()

    async def load(
        self, namespace: str, source: AsyncIterator[bytes], *, compress: bool = False
    ) -> Descriptor:
        """Store what an archive holds; work under a lease.

        Args:
            namespace: whose.
            source: the archive, plain, gzip or zstd.
            compress: compress layers of ``docker save`` that are not.

        Returns:
            An index, in the store, with an entry for each image and name; the names are in the
            annotations ``IMAGE_NAME`` and ``REF_NAME``.

        Raises:
            InvalidArgument: it is no archive of images, or something in it makes no sense.
            NotFound: a part of an image that it lists is not in it.
            DataLoss: it is cut short, or a blob is not what its name says.
            ResourceExhausted: it passes a limit.
        """
        async with aclosing(decompressed(source)) as plain:
            tar = TarStream(
                plain, max_entries=self._limits.entries, max_bytes=self._limits.total_bytes
            )
            contents = _Contents({}, {}, {})
            while (entry := await tar.next()) is not None:
                await self._take(namespace, tar, entry, contents)
            async for _ in plain:  # the sender is waited for, with what it pads
                pass
        if LAYOUT_FILE in contents.documents:
            return await self._oci(namespace, contents)
        if DOCKER_FILE in contents.documents:
            return await self._docker(namespace, contents, compress=compress)
        raise InvalidArgument(
            f"the archive is neither an OCI layout nor of docker save: it has no {LAYOUT_FILE} and "
            f"no {DOCKER_FILE}"
        )

    async def _take(
        self, namespace: str, tar: TarStream, entry: TarEntry, contents: _Contents
    ) -> None:
        name = posixpath.normpath(entry.name.lstrip("/"))
        if entry.link:
            base = posixpath.dirname(name) if entry.is_symlink else ""
            contents.links[name] = posixpath.normpath(posixpath.join(base, entry.link))
        elif not entry.is_file or _USELESS.fullmatch(name):
            return
        elif name in _DOCUMENTS:
            contents.documents[name] = await tar.read(max_bytes=self._limits.document_bytes)
        else:
            contents.blobs[name] = await self._ingest(namespace, name, entry.size_bytes, tar)

    async def _ingest(
        self, namespace: str, name: str, size_bytes: int, tar: TarStream
    ) -> Descriptor:
        match = _BLOB.fullmatch(name)
        expected = f"{match[1]}:{match[2]}" if match else ""
        try:
            digest = await store_blob(
                self._content,
                namespace,
                tar.chunks(),
                size_bytes=size_bytes,
                expected=expected,
            )
        except FailedPrecondition as error:
            raise DataLoss(f"{name} of the archive is broken: {error.message}") from error
        return Descriptor("", digest, size_bytes)

    async def _oci(self, namespace: str, contents: _Contents) -> Descriptor:
        layout = _json(contents.documents[LAYOUT_FILE], LAYOUT_FILE)
        version = layout.get("imageLayoutVersion") if isinstance(layout, dict) else None
        if version != LAYOUT_VERSION:
            raise InvalidArgument(
                f"the archive has OCI layout version {version!r}, supported is {LAYOUT_VERSION!r}"
            )
        if INDEX_FILE not in contents.documents:
            raise NotFound(f"the archive is an OCI layout without {INDEX_FILE}")
        data = contents.documents[INDEX_FILE]
        parse_index(data, media_types.OCI_INDEX)
        return await self._document(namespace, data, media_types.OCI_INDEX)

    async def _docker(self, namespace: str, contents: _Contents, *, compress: bool) -> Descriptor:
        listed = _json(contents.documents[DOCKER_FILE], DOCKER_FILE)
        if not isinstance(listed, list) or len(listed) > self._limits.images:
            raise InvalidArgument(f"{DOCKER_FILE} of the archive is no list of images")
        entries = []
        for item in listed:
            image = _DockerImage.parse(item)
            manifest = await self._docker_manifest(namespace, contents, image, compress=compress)
            for tag in image.tags:
                name = str(parse_familiar_name(tag))
                names = {IMAGE_NAME: name, REF_NAME: oci_ref_name(name)}
                entries.append(replace(manifest, annotations=names))
            if not image.tags:
                entries.append(manifest)
        index = {
            "schemaVersion": 2,
            "mediaType": media_types.OCI_INDEX,
            "manifests": [describe(entry) for entry in entries],
        }
        return await self._document(namespace, _dump(index), media_types.OCI_INDEX)

    async def _docker_manifest(
        self, namespace: str, contents: _Contents, image: _DockerImage, *, compress: bool
    ) -> Descriptor:
        config = replace(contents.find(image.config), media_type=media_types.DOCKER_CONFIG)
        parsed = parse_config(await self._content.read(namespace, config.digest))
        layers = [
            await self._layer(namespace, contents.find(name), compress=compress)
            for name in image.layers
        ]
        manifest = {
            "schemaVersion": 2,
            "mediaType": media_types.DOCKER_MANIFEST,
            "config": describe(config),
            "layers": [describe(layer) for layer in layers],
        }
        stored = await self._document(namespace, _dump(manifest), media_types.DOCKER_MANIFEST)
        return replace(stored, platform=parsed.platform)

    async def _layer(self, namespace: str, layer: Descriptor, *, compress: bool) -> Descriptor:
        """A layer with its media type, which only its first bytes tell."""
        chunks = self._content.chunks(namespace, layer.digest, size_bytes=len(ZSTD_MAGIC))
        head = b"".join([chunk async for chunk in chunks])
        if head.startswith(GZIP_MAGIC):
            return replace(layer, media_type=media_types.DOCKER_LAYER_GZIP)
        if head.startswith(ZSTD_MAGIC):
            return replace(layer, media_type=media_types.DOCKER_LAYER_ZSTD)
        if not compress:
            return replace(layer, media_type=media_types.DOCKER_LAYER)
        digest = await store_blob(
            self._content,
            namespace,
            gzipped(self._content.chunks(namespace, layer.digest)),
            labels={UNCOMPRESSED: layer.digest},
        )
        info = await self._content.info(namespace, digest)
        return Descriptor(media_types.DOCKER_LAYER_GZIP, digest, info.size_bytes)

    async def _document(self, namespace: str, data: bytes, media_type: str) -> Descriptor:
        async def source() -> AsyncIterator[bytes]:
            yield data

        digest = digest_of(data)
        await store_blob(self._content, namespace, source(), size_bytes=len(data), expected=digest)
        return Descriptor(media_type, digest, len(data))


async def store_blob(
    content: ContentStore,
    namespace: str,
    source: AsyncIterator[bytes],
    *,
    size_bytes: int = 0,
    expected: str = "",
    labels: Mapping[str, str] | None = None,
) -> str:
    """Write a stream to the content store; returns its digest, also if that was there already.

    Raises:
        FailedPrecondition: the stream is not what is expected.
    """
    ref = f"store-{secrets.token_hex(8)}"
    try:
        writer = await content.writer(namespace, ref, total_bytes=size_bytes, expected=expected)
    except AlreadyExists:
        return expected
    try:
        async with writer:
            if not writer.offset_bytes:  # or else another namespace has it
                async for chunk in source:
                    await writer.write(chunk)
            with suppress(AlreadyExists):
                await writer.commit(size_bytes=size_bytes, expected=expected, labels=labels)
            return writer.digest
    except BaseException:
        with suppress(NotFound):
            await content.abort(namespace, ref)
        raise


@frozen
class _Contents:
    documents: dict[str, bytes]
    blobs: dict[str, Descriptor]
    links: dict[str, str]

    def find(self, name: str) -> Descriptor:
        """The blob of a name, through the archive's links."""
        name = posixpath.normpath(name.lstrip("/"))
        seen = set()
        while name in self.links and name not in seen:
            seen.add(name)
            name = self.links[name]
        if name not in self.blobs:
            raise NotFound(f"the archive has no file {name!r}, which {DOCKER_FILE} lists")
        return self.blobs[name]


@frozen
class _DockerImage:
    config: str
    tags: tuple[str, ...]
    layers: tuple[str, ...]

    @classmethod
    def parse(cls, item: Any) -> _DockerImage:
        if not isinstance(item, dict) or not isinstance(item.get("Config"), str):
            raise InvalidArgument(f"{DOCKER_FILE} of the archive has an image without Config")
        lists = [item.get("RepoTags") or [], item.get("Layers") or []]
        for values in lists:
            if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
                raise InvalidArgument(f"{DOCKER_FILE} of the archive has what is no list of names")
        return cls(item["Config"], tuple(lists[0]), tuple(lists[1]))


def _json(data: bytes, name: str) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"{name} of the archive is not JSON: {error}") from error


def _dump(document: Mapping[str, object]) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()
