"""A repository at one host that speaks the distribution API, version 2: resolving and fetching.

Uploads are in :mod:`services.containerd.remotes.upload`, the choice of the host in
:mod:`services.containerd.remotes.mirrors`.
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from typing import TYPE_CHECKING

from services.common.errors import (
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    ResourceExhausted,
    Unavailable,
)
from services.containerd.content.descriptor import Descriptor
from services.containerd.content.digest import digest_of, is_digest, split_digest
from services.containerd.content.store import CHUNK_BYTES, MANIFEST_MAX_BYTES
from services.containerd.images.manifest import not_an_image
from services.containerd.images.media_types import (
    ACCEPTED,
    OCI_INDEX,
    OCI_MANIFEST,
    is_index,
    is_manifest,
    is_schema_1,
)
from services.containerd.remotes.http import read_bounded
from services.containerd.remotes.referrers import Referrers
from services.containerd.remotes.retry import Retry, retried
from services.containerd.remotes.upload import Uploader

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    import aiohttp

    from services.containerd.content.store import ContentWriter
    from services.containerd.images.reference import Reference
    from services.containerd.remotes.api import RepositoryApi
    from services.containerd.remotes.retry import RetryPolicy

_ACCEPT = ", ".join((*ACCEPTED, "*/*"))
_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")


class Repository:
    """One host's side of a :class:`Remote`."""

    def __init__(self, api: RepositoryApi, *, policy: RetryPolicy) -> None:
        self._api = api
        self._policy = policy
        self._referrers = Referrers(api, policy=policy)
        self._uploader = Uploader(api, self._referrers, policy=policy)

    @property
    def reference(self) -> Reference:
        """See :class:`Remote`."""
        return self._api.reference

    async def resolve(self) -> Descriptor:
        """See :class:`Remote`."""
        wanted = self.reference.object
        if not wanted:
            raise InvalidArgument(
                f"reference {str(self.reference)!r} names no tag and no digest: add one",
                field="reference",
            )
        descriptor = await retried(self._policy, lambda: self._head(wanted))
        if descriptor is None:
            descriptor = await retried(self._policy, lambda: self._get(wanted))
        if descriptor.size_bytes > MANIFEST_MAX_BYTES:
            raise ResourceExhausted(
                f"the manifest of {self.reference} has {descriptor.size_bytes} bytes, more than "
                f"{MANIFEST_MAX_BYTES}"
            )
        if not (is_index(descriptor.media_type) or is_manifest(descriptor.media_type)):
            raise not_an_image(descriptor)
        return descriptor

    async def fetch(self, descriptor: Descriptor, writer: ContentWriter) -> None:
        """See :class:`Remote`."""
        retry = Retry(self._policy)
        while True:
            before = writer.offset_bytes
            try:
                if before < descriptor.size_bytes:
                    await self._fetch_from(descriptor, writer)
                if writer.offset_bytes == descriptor.size_bytes:
                    return
                raise Unavailable(
                    f"{self._api.host} sent {writer.offset_bytes} of "
                    f"{descriptor.size_bytes} bytes of {descriptor.digest}"
                )
            except Unavailable as error:
                if writer.offset_bytes - before >= CHUNK_BYTES:
                    retry.progressed()
                await retry.wait(error)

    async def referrers(self, digest: str) -> tuple[Descriptor, ...]:
        """See :class:`Remote`."""
        return await self._referrers.find(digest)

    async def has(self, descriptor: Descriptor) -> bool:
        """See :class:`Remote`."""
        return await self._uploader.has(descriptor)

    async def push(
        self,
        descriptor: Descriptor,
        read: Callable[[int], AsyncGenerator[bytes, None]],
        *,
        mount_from: str = "",
        tag: str = "",
    ) -> None:
        """See :class:`Remote`."""
        await self._uploader.push(descriptor, read, mount_from=mount_from, tag=tag)

    async def _head(self, wanted: str) -> Descriptor | None:
        """What the headers say; None if they do not say enough."""
        url = self._api.url("manifests", wanted)
        async with self._api.request(
            "HEAD", url, headers={"Accept": _ACCEPT}, expected=(200, 405, 501)
        ) as response:
            media_type = self._media_type(response)
            digest = self.reference.digest or response.headers.get("Docker-Content-Digest", "")
            size = response.content_length
            if response.status != 200 or not digest or size is None or not media_type:
                return None
            if not is_digest(digest):
                raise DataLoss(
                    f"{self._api.host} names {self.reference} by what is no digest: "
                    f"{digest[:100]!r}"
                )
            return Descriptor(media_type, digest, size)

    async def _get(self, wanted: str) -> Descriptor:
        """What the manifest itself says, for registries with too few headers."""
        url = self._api.url("manifests", wanted)
        async with self._api.request("GET", url, headers={"Accept": _ACCEPT}) as response:
            media_type = self._media_type(response)
            data = await read_bounded(response, MANIFEST_MAX_BYTES)
        algorithm = split_digest(self.reference.digest)[0] if self.reference.digest else "sha256"
        return Descriptor(
            media_type or _own_media_type(data), digest_of(data, algorithm), len(data)
        )

    def _media_type(self, response: aiohttp.ClientResponse) -> str:
        """The type of a manifest; empty if the header does not say."""
        media_type = response.content_type
        if response.status == 200 and media_type == "text/html":
            raise FailedPrecondition(
                f"{self._api.host} answered with an HTML page: it is not a registry, or a "
                "proxy stands before it"
            )
        known = is_index(media_type) or is_manifest(media_type) or is_schema_1(media_type)
        return media_type if known else ""

    async def _fetch_from(self, descriptor: Descriptor, writer: ContentWriter) -> None:
        offset = writer.offset_bytes
        media_type = descriptor.media_type
        kind = "manifests" if is_index(media_type) or is_manifest(media_type) else "blobs"
        headers = {"Accept": f"{media_type or '*/*'}, */*"}
        if offset:
            headers["Range"] = f"bytes={offset}-"
        async with self._api.request(
            "GET",
            self._api.url(kind, descriptor.digest),
            headers=headers,
            expected=(200, 206, 416),
        ) as response:
            if response.status == 416:
                await writer.truncate()
                raise Unavailable(f"{self._api.host} does not send blobs in parts")
            if response.content_type == "text/html":
                raise FailedPrecondition(
                    f"{self._api.host} answered with an HTML page instead of {descriptor.digest}"
                )
            total = _total_bytes(response)
            if total is not None and total != descriptor.size_bytes:
                raise DataLoss(
                    f"{self._api.host} has {total} bytes of {descriptor.digest}, whose size is "
                    f"{descriptor.size_bytes}"
                )
            intake = _Intake(descriptor, writer, skip=offset - _start(response))
            try:
                async for data in response.content.iter_any():
                    await intake.add(data)
            finally:  # what came before a connection broke need not come again
                await intake.flush()


class _Intake:
    """Gathers what arrives into chunks that are worth a trip to a thread."""

    def __init__(self, descriptor: Descriptor, writer: ContentWriter, *, skip: int) -> None:
        self._descriptor = descriptor
        self._writer = writer
        self._skip = skip
        self._parts: list[bytes] = []
        self._gathered = 0

    async def add(self, data: bytes) -> None:
        if self._skip:
            data, self._skip = data[self._skip :], max(0, self._skip - len(data))
        self._parts.append(data)
        self._gathered += len(data)
        if self._writer.offset_bytes + self._gathered > self._descriptor.size_bytes:
            self._parts.clear()
            self._gathered = 0
            raise DataLoss(
                f"the registry sent more than the {self._descriptor.size_bytes} bytes of "
                f"{self._descriptor.digest}"
            )
        if self._gathered >= CHUNK_BYTES:
            await self.flush()

    async def flush(self) -> None:
        if self._gathered:
            data = b"".join(self._parts)
            self._parts.clear()
            self._gathered = 0
            await self._writer.write(data)


def _start(response: aiohttp.ClientResponse) -> int:
    """Offset of the first byte of a response; one that is not partial begins at 0."""
    if response.status != 206:
        return 0
    match = _CONTENT_RANGE.match(response.headers.get("Content-Range", ""))
    if match is None:
        raise DataLoss(f"{response.url.authority} does not say which part of a blob it sends")
    return int(match.group(1))


def _total_bytes(response: aiohttp.ClientResponse) -> int | None:
    """Size of the whole blob, as far as the headers of a response tell."""
    if response.status != 206:
        return response.content_length
    match = _CONTENT_RANGE.match(response.headers.get("Content-Range", ""))
    return int(match[2]) if match is not None and match[2] != "*" else None


def _own_media_type(data: bytes) -> str:
    """The type that a manifest gives itself, or that its fields give away; or empty."""
    with suppress(ValueError, RecursionError):
        document = json.loads(data)
        if isinstance(document, dict):
            if isinstance(document.get("mediaType"), str):
                return str(document["mediaType"])
            if "manifests" in document:
                return OCI_INDEX
            if "config" in document:
                return OCI_MANIFEST
    return ""
