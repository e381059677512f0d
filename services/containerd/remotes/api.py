"""Requests to one repository: authorization, statuses turned into errors, the URLs."""

from __future__ import annotations

import json
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from services.common.errors import (
    FailedPrecondition,
    NotFound,
    PermissionDenied,
    TheseusError,
    Unauthenticated,
    Unavailable,
)
from services.containerd.remotes.auth import parse_challenges
from services.containerd.remotes.http import read_bounded
from services.containerd.remotes.retry import parse_retry_after

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection, Mapping

    import aiohttp
    from yarl import URL

    from services.containerd.images.reference import Reference
    from services.containerd.remotes.auth import Authorizer
    from services.containerd.remotes.body import Body
    from services.containerd.remotes.endpoint import Endpoint
    from services.containerd.remotes.http import HttpClient, Transport
    from services.containerd.remotes.remote import RegistryAccess

_ERROR_MAX_BYTES = 64 << 10
_ERROR_SHOWN_CHARS = 300
_BUSY = frozenset({408, 425, 429, 500, 502, 503, 504})


class RepositoryApi:
    """The HTTP API of one repository at one host (OCI distribution-spec, "API")."""

    def __init__(
        self,
        http: HttpClient,
        authorizer: Authorizer,
        reference: Reference,
        access: RegistryAccess,
        *,
        endpoint: Endpoint,
        transport: Transport,
    ) -> None:
        self._http = http
        self._authorizer = authorizer
        self._access = access
        self.reference = reference
        self._endpoint = endpoint
        self._transport = transport

    @property
    def host(self) -> str:
        """Whom requests go to, for messages."""
        return self._endpoint.root.authority

    def url(self, *parts: str) -> URL:
        """Address of something in the repository: ``url("manifests", "latest")``."""
        url = self._endpoint.root.joinpath(*self.reference.path.split("/"), *parts)
        if self._endpoint.stands_for and parts[:2] != ("blobs", "uploads"):
            # What a mirror of several registries tells them apart by; containerd's convention.
            return url.update_query(ns=self._endpoint.stands_for)
        return url

    @asynccontextmanager
    async def request(
        self,
        method: str,
        url: URL,
        *,
        headers: Mapping[str, str] | None = None,
        body: Body | None = None,
        actions: str = "pull",
        also_from: str = "",
        expected: Collection[int] = (200,),
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Send a request, and again with authorization if the registry wants it.

        Args:
            method: of HTTP.
            url: where to.
            headers: beside those of the access.
            body: what to send.
            actions: what a token has to allow: ``pull``, or ``pull,push``.
            also_from: another repository that it has to be able to pull from.
            expected: statuses that are not failures.

        Raises:
            TheseusError: what another status stands for; see :class:`Remote`.
        """
        scope = f"repository:{self.reference.path}:{actions}"
        if also_from:
            scope += f" repository:{also_from}:pull"
        ours = url.origin() == self._endpoint.root.origin()
        authorization = self._authorizer.header(url.authority, scope) if ours else ""
        for may_answer in (ours, False):
            sent = {**self._access.headers, **(headers or {})}
            if authorization:
                sent["Authorization"] = authorization
            async with self._http.request(
                method,
                url,
                headers=sent,
                own_headers=self._endpoint.headers if ours else (),
                body=body,
                transport=self._transport,
            ) as response:
                # Somebody that we were redirected to gets no credentials.
                challenged = response.status == 401 and response.url.origin() == url.origin()
                if not (challenged and may_answer):
                    if response.status not in expected:
                        raise await _failure(response, self.reference)
                    yield response
                    return
                challenges = parse_challenges(response.headers.getall("WWW-Authenticate", []))
            authorization = await self._authorizer.answer(url, challenges, scope, authorization)


async def _failure(response: aiohttp.ClientResponse, reference: Reference) -> TheseusError:
    host, status = response.url.authority, response.status
    said = await _message(response)
    what = f"{host} answered {status} to {response.method} {response.url.path}{said}"
    if status == 401:
        return Unauthenticated(
            f"access to {reference.name} denied: it does not exist, or wants authorization ({what})"
        )
    if status == 403:
        return PermissionDenied(f"access to {reference.name} refused ({what})")
    if status == 404:
        return NotFound(
            f"not found in {reference.name} ({what})", resource=("image", str(reference))
        )
    if status in _BUSY:
        return Unavailable(
            what, retry_after_s=parse_retry_after(response.headers.get("Retry-After", ""))
        )
    return FailedPrecondition(what)


async def _message(response: aiohttp.ClientResponse) -> str:
    """What a registry says of a failure (distribution-spec, "Error Codes"), to put into ours."""
    if response.method == "HEAD" or response.content_type == "text/html":
        return ""
    try:
        document = json.loads(await read_bounded(response, _ERROR_MAX_BYTES))
        said = "; ".join(
            str(error.get("message") or error.get("code")) for error in document["errors"]
        )
    except (TheseusError, ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return ""
    shown = "".join(c for c in said if c.isprintable())[:_ERROR_SHOWN_CHARS]
    return f": {shown}" if shown else ""
