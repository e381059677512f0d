"""Uploads to registries that speak the distribution API, version 2."""

from __future__ import annotations

from typing import TYPE_CHECKING

from yarl import URL

from services.common.errors import DataLoss, FailedPrecondition
from services.containerd.images.media_types import OCTET_STREAM, is_index, is_manifest
from services.containerd.remotes.body import Body
from services.containerd.remotes.retry import RetryPolicy, retried

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    import aiohttp

    from services.containerd.content.descriptor import Descriptor
    from services.containerd.remotes.api import RepositoryApi

_PUSH = "pull,push"


class Uploader:
    """Sends blobs in one piece each, and manifests; what the registry has already is not sent."""

    def __init__(self, api: RepositoryApi, *, policy: RetryPolicy) -> None:
        self._api = api
        self._policy = policy

    async def has(self, descriptor: Descriptor) -> bool:
        """See :meth:`Remote.has`."""
        return await retried(self._policy, lambda: self._has(descriptor))

    async def push(
        self,
        descriptor: Descriptor,
        read: Callable[[], AsyncIterator[bytes]],
        *,
        mount_from: str,
        tag: str,
    ) -> None:
        """See :meth:`Remote.push`."""
        body = Body(read, descriptor.size_bytes)
        if _is_document(descriptor):
            await retried(self._policy, lambda: self._put_manifest(descriptor, body, tag))
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

    async def _put_manifest(self, descriptor: Descriptor, body: Body, tag: str) -> None:
        async with self._api.request(
            "PUT",
            self._api.url("manifests", tag or descriptor.digest),
            headers=_body_headers(body, descriptor.media_type),
            body=body,
            actions=_PUSH,
            expected=(200, 201, 202),
        ) as response:
            self._check_digest(response, descriptor)

    async def _put_blob(self, descriptor: Descriptor, body: Body, mount_from: str) -> None:
        location = await self._begin(descriptor, mount_from)
        if location is None:
            return
        async with self._api.request(
            "PUT",
            location.update_query(digest=descriptor.digest),
            headers=_body_headers(body, OCTET_STREAM),
            body=body,
            actions=_PUSH,
            expected=(200, 201, 202, 204),
        ) as response:
            self._check_digest(response, descriptor)

    async def _begin(self, descriptor: Descriptor, mount_from: str) -> URL | None:
        """Where to send the blob to; None if the registry took it from ``mount_from``."""
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
            location = response.headers.get("Location", "")
        try:
            target = url.with_query(None).join(URL(location, encoded=True))
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
