"""Uploads to registries that speak the distribution API, version 2.

A blob that is not large goes in one request. A larger one goes in chunks, one after the other: when
the connection breaks, the registry is asked how far it has come. One that knows no chunks gets it
in one request after all.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

import structlog
from yarl import URL

from services.common.errors import DataLoss, FailedPrecondition, Unavailable
from services.common.frozen import frozen
from services.containerd.images.manifest import parse_manifest
from services.containerd.images.media_types import OCTET_STREAM, is_index, is_manifest
from services.containerd.remotes.body import Body
from services.containerd.remotes.retry import Retry, RetryPolicy, retried

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    import aiohttp

    from services.containerd.content.descriptor import Descriptor
    from services.containerd.remotes.api import RepositoryApi
    from services.containerd.remotes.referrers import Referrers

log = structlog.get_logger(__name__)

CHUNK_BYTES = 16 << 20

_PUSH = "pull,push"
_RANGE = re.compile(r"(?:bytes=)?0-(\d{1,18})")


class _NoChunks(Exception):
    """The registry does not take a blob in chunks."""


@frozen
class _Upload:
    """A session: where the next request goes, and how large a chunk must be at least."""

    location: URL
    least_bytes: int


class Uploader:
    """Sends blobs and manifests."""

    def __init__(
        self,
        api: RepositoryApi,
        referrers: Referrers,
        *,
        policy: RetryPolicy,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        self._api = api
        self._referrers = referrers
        self._policy = policy
        self._chunk_bytes = chunk_bytes

    async def has(self, descriptor: Descriptor) -> bool:
        """See :meth:`Remote.has`."""
        return await retried(self._policy, lambda: self._has(descriptor))

    async def push(
        self,
        descriptor: Descriptor,
        read: Callable[[int], AsyncGenerator[bytes, None]],
        *,
        mount_from: str,
        tag: str,
    ) -> None:
        """See :meth:`Remote.push`."""
        body = Body(read, descriptor.size_bytes)
        if _is_document(descriptor):
            lists = await retried(self._policy, lambda: self._put_manifest(descriptor, body, tag))
            if not lists and is_manifest(descriptor.media_type):
                await self._list_as_referrer(descriptor, body)
        else:
            await retried(self._policy, lambda: self._put_blob(descriptor, body, mount_from))

    async def _has(self, descriptor: Descriptor) -> bool:
        kind = "manifests" if _is_document(descriptor) else "blobs"
        async with self._api.request(
            "HEAD",
            self._api.url(kind, descriptor.digest),
            headers={"Accept": f"{descriptor.media_type or '*/*'}, */*"},
            actions=_PUSH,
            expected=(200, 404),
        ) as response:
            return response.status == 200

    async def _put_manifest(self, descriptor: Descriptor, body: Body, tag: str) -> bool:
        """Returns whether the registry lists referrers itself (spec, "Pushing Manifests")."""
        async with self._api.request(
            "PUT",
            self._api.url("manifests", tag or descriptor.digest),
            headers=_body_headers(body, descriptor.media_type),
            body=body,
            actions=_PUSH,
            expected=(200, 201, 202),
        ) as response:
            self._check_digest(response, descriptor)
            return "OCI-Subject" in response.headers

    async def _list_as_referrer(self, descriptor: Descriptor, body: Body) -> None:
        data = b"".join([piece async for piece in body.chunks()])
        manifest = parse_manifest(data, descriptor.media_type)
        if manifest.subject is not None:
            referrer = replace(
                descriptor,
                platform=None,
                artifact_type=manifest.artifact_type,
                annotations=manifest.annotations,
            )
            await self._referrers.add(manifest.subject.digest, referrer)

    async def _put_blob(self, descriptor: Descriptor, body: Body, mount_from: str) -> None:
        upload = await self._begin(descriptor, mount_from)
        if upload is None:
            return
        location = upload.location
        if body.size_bytes > max(self._chunk_bytes, upload.least_bytes):
            try:
                location = await self._send_chunks(upload, body)
            except _NoChunks as refusal:
                log.info("blob is sent in one piece", digest=descriptor.digest, why=str(refusal))
                again = await self._begin(descriptor, "")
                assert again is not None, "without a repository to mount from there is an upload"
                location = again.location
            else:
                body = body.part(body.size_bytes, 0)
        async with self._api.request(
            "PUT",
            location.update_query(digest=descriptor.digest),
            headers=_body_headers(body, OCTET_STREAM),
            body=body,
            actions=_PUSH,
            expected=(200, 201, 202, 204),
        ) as response:
            self._check_digest(response, descriptor)

    async def _send_chunks(self, upload: _Upload, body: Body) -> URL:
        """Send a blob in chunks; returns where to finish it."""
        retry = Retry(self._policy)
        chunk_bytes = max(self._chunk_bytes, upload.least_bytes)
        location, offset = upload.location, 0
        while offset < body.size_bytes:
            part = body.part(offset, chunk_bytes)
            try:
                location = await self._send_chunk(location, part)
            except Unavailable as error:
                await retry.wait(error)
                location, offset = await self._progress(location)
                if offset > part.offset:
                    retry.progressed()
            else:
                offset += part.size_bytes
                retry.progressed()
        return location

    async def _send_chunk(self, location: URL, part: Body) -> URL:
        last = part.offset + part.size_bytes - 1
        headers = _body_headers(part, OCTET_STREAM) | {"Content-Range": f"{part.offset}-{last}"}
        async with self._api.request(
            "PATCH",
            location,
            headers=headers,
            body=part,
            actions=_PUSH,
            expected=(202, 204, 400, 404, 405, 411, 416, 501),
        ) as response:
            if response.status not in (202, 204):
                raise _NoChunks(f"{self._api.host} answered {response.status} to a chunk")
            return self._location(location, response)

    async def _progress(self, location: URL) -> tuple[URL, int]:
        """Where an upload goes on, and from which byte on."""
        async with self._api.request(
            "GET", location, actions=_PUSH, expected=(202, 204, 400, 404, 405, 501)
        ) as response:
            match = _RANGE.fullmatch(response.headers.get("Range", ""))
            if response.status not in (202, 204) or match is None:
                raise _NoChunks(f"{self._api.host} does not say how far an upload has come")
            # "0-0" stands for one byte, and at docker's registry for none.
            last = int(match[1])
            return self._location(location, response), last + 1 if last else 0

    async def _begin(self, descriptor: Descriptor, mount_from: str) -> _Upload | None:
        """Begin to send a blob; None if the registry took it from ``mount_from``."""
        url = self._api.url("blobs", "uploads") / ""
        if mount_from:
            url = url.update_query(mount=descriptor.digest, **{"from": mount_from})
        async with self._api.request(
            "POST",
            url,
            headers={"Content-Length": "0"},
            actions=_PUSH,
            also_from=mount_from,
            expected=(201, 202),
        ) as response:
            if response.status == 201:
                return None
            least = response.headers.get("OCI-Chunk-Min-Length", "")
            return _Upload(
                self._location(url.with_query(None), response),
                int(least) if least.isascii() and least.isdigit() else 0,
            )

    def _location(self, url: URL, response: aiohttp.ClientResponse) -> URL:
        """Where the registry wants the next request of an upload."""
        location = response.headers.get("Location", "")
        try:
            target = url.join(URL(location, encoded=True))
        except ValueError as error:
            raise DataLoss(f"{url.authority} takes uploads at what is no URL") from error
        if not location or target.scheme not in ("http", "https"):
            raise DataLoss(f"{url.authority} does not say where it takes uploads")
        if url.scheme == "https" and target.scheme == "http":
            raise FailedPrecondition(f"{url.authority} wants an upload without TLS: refused")
        return target

    def _check_digest(self, response: aiohttp.ClientResponse, descriptor: Descriptor) -> None:
        digest = response.headers.get("Docker-Content-Digest", descriptor.digest)
        if digest != descriptor.digest:
            raise DataLoss(f"{response.url.authority} stored {digest} for {descriptor.digest}")


def _is_document(descriptor: Descriptor) -> bool:
    return is_index(descriptor.media_type) or is_manifest(descriptor.media_type)


def _body_headers(body: Body, media_type: str) -> dict[str, str]:
    return {"Content-Type": media_type, "Content-Length": str(body.size_bytes)}
