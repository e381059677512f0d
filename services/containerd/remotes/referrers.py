"""What refers to a manifest in a repository: signatures, bills of materials, other artifacts.

A registry of distribution-spec 1.1 has an API for it. In an older one the list is an index of its
own, under a tag made of the digest ("Referrers Tag Schema"), and whoever pushes an artifact there
keeps that up to date.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

from yarl import URL

from services.common.errors import DataLoss, NotFound, ResourceExhausted
from services.containerd.content.store import MANIFEST_MAX_BYTES
from services.containerd.images.manifest import describe, parse_index
from services.containerd.images.media_types import OCI_INDEX
from services.containerd.remotes.body import bytes_body
from services.containerd.remotes.http import read_bounded
from services.containerd.remotes.retry import RetryPolicy, retried

if TYPE_CHECKING:
    import aiohttp

    from services.containerd.content.descriptor import Descriptor
    from services.containerd.remotes.api import RepositoryApi

_PAGES_MAX = 100
_NO_API = (400, 404, 405, 501)
_NEXT = re.compile(r'<([^>]*)>\s*;\s*rel="?next"?')


class Referrers:
    """The referrers of one repository at one host."""

    def __init__(self, api: RepositoryApi, *, policy: RetryPolicy) -> None:
        self._api = api
        self._policy = policy

    async def find(self, digest: str) -> tuple[Descriptor, ...]:
        """What refers to a manifest or an index, with ``artifact_type``; also when it is not there.

        Raises:
            MalformedManifest: the list does not parse.
            ResourceExhausted: it is too long.
        """
        found = await retried(self._policy, lambda: self._by_api(digest))
        if found is None:
            found = await retried(self._policy, lambda: self._by_tag(digest))
        return found

    async def add(self, subject: str, referrer: Descriptor) -> None:
        """Put one more into the list under the tag, for a registry that keeps no list itself.

        Two that do this at once may lose one another's entry: the schema knows no better.
        """
        known = await retried(self._policy, lambda: self._by_tag(subject))
        if any(each.digest == referrer.digest for each in known):
            return
        index = {
            "schemaVersion": 2,
            "mediaType": OCI_INDEX,
            "manifests": [describe(each) for each in (*known, referrer)],
        }
        body = bytes_body(json.dumps(index, separators=(",", ":")).encode())

        async def put() -> None:
            headers = {"Content-Type": OCI_INDEX, "Content-Length": str(body.size_bytes)}
            async with self._api.request(
                "PUT",
                self._api.url("manifests", _tag(subject)),
                headers=headers,
                body=body,
                actions="pull,push",
                expected=(200, 201, 202),
            ):
                pass

        await retried(self._policy, put)

    async def _by_api(self, digest: str) -> tuple[Descriptor, ...] | None:
        """None: the registry has no such API."""
        url = self._api.url("referrers", digest)
        found: list[Descriptor] = []
        for _ in range(_PAGES_MAX):
            async with self._api.request(
                "GET", url, headers={"Accept": OCI_INDEX}, expected=(200, *_NO_API)
            ) as response:
                if response.status != 200 or response.content_type == "text/html":
                    return None
                found += parse_index(await read_bounded(response, MANIFEST_MAX_BYTES), OCI_INDEX)
                following = _next_page(url, response)
            if following is None:
                return tuple(found)
            url = following
        raise ResourceExhausted(
            f"{self._api.host} lists what refers to {digest} in more than {_PAGES_MAX} pages"
        )

    async def _by_tag(self, digest: str) -> tuple[Descriptor, ...]:
        url = self._api.url("manifests", _tag(digest))
        try:
            async with self._api.request("GET", url, headers={"Accept": OCI_INDEX}) as response:
                return parse_index(await read_bounded(response, MANIFEST_MAX_BYTES), OCI_INDEX)
        except NotFound:
            return ()


def _tag(digest: str) -> str:
    """The tag of a list; a digest is longer than a tag may be for some algorithms only."""
    return digest.replace(":", "-", 1)[:128]


def _next_page(url: URL, response: aiohttp.ClientResponse) -> URL | None:
    match = _NEXT.search(response.headers.get("Link", ""))
    if match is None:
        return None
    try:
        following = url.join(URL(match[1], encoded=True))
    except ValueError as error:
        raise DataLoss(f"{url.authority} names a further page by what is no URL") from error
    if following.origin() != url.origin():
        raise DataLoss(f"{url.authority} names a further page at {following.authority}: refused")
    return following
