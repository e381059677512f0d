"""Requests to one repository: authorization, statuses turned into errors, the URLs."""

from __future__ import annotations

import ipaddress
import json
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from yarl import URL

from services.common.errors import (
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    TheseusError,
    Unauthenticated,
    Unavailable,
)
from services.containerd.images.reference import DEFAULT_DOMAIN
from services.containerd.remotes.auth import parse_challenges
from services.containerd.remotes.http import read_bounded
from services.containerd.remotes.retry import parse_retry_after

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection, Mapping

    import aiohttp

    from services.containerd.images.reference import Reference
    from services.containerd.remotes.auth import Authorizer
    from services.containerd.remotes.body import Body
    from services.containerd.remotes.http import HttpClient
    from services.containerd.remotes.remote import RegistryAccess

_ERROR_MAX_BYTES = 64 << 10
_ERROR_SHOWN_CHARS = 300
_BUSY = frozenset({408, 425, 429, 500, 502, 503, 504})

_HOSTS = {DEFAULT_DOMAIN: "registry-1.docker.io"}
"""Domains whose registry lives somewhere else."""


class RepositoryApi:
    """The HTTP API of one repository (OCI distribution-spec, "API")."""

    def __init__(
        self, http: HttpClient, authorizer: Authorizer, reference: Reference, access: RegistryAccess
    ) -> None:
        self._http = http
        self._authorizer = authorizer
        self._access = access
        self.reference = reference
        self._root = registry_url(reference.domain, access.default_scheme) / "v2"

    def url(self, *parts: str) -> URL:
        """Address of something in the repository: ``url("manifests", "latest")``."""
        return self._root.joinpath(*self.reference.path.split("/"), *parts)

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
        ours = url.origin() == self._root.origin()
        authorization = self._authorizer.header(url.authority, scope) if ours else ""
        for may_answer in (ours, False):
            sent = {**self._access.headers, **(headers or {})}
            if authorization:
                sent["Authorization"] = authorization
            async with self._http.request(method, url, headers=sent, body=body) as response:
                # Somebody that we were redirected to gets no credentials.
                challenged = response.status == 401 and response.url.origin() == url.origin()
                if not (challenged and may_answer):
                    if response.status not in expected:
                        raise await _failure(response, self.reference)
                    yield response
                    return
                challenges = parse_challenges(response.headers.getall("WWW-Authenticate", []))
            authorization = await self._authorizer.answer(url, challenges, scope, authorization)


def registry_url(domain: str, default_scheme: str) -> URL:
    """Address of the registry of a domain.

    Raises:
        InvalidArgument: there is no domain, or the scheme is another than http or https.
    """
    if not domain:
        raise InvalidArgument(
            "the reference names no registry: write it in full, as in docker.io/library/alpine",
            field="reference",
        )
    if default_scheme not in ("", "http", "https"):
        raise InvalidArgument(
            f"scheme {default_scheme!r} is not supported: want http or https",
            field="default_scheme",
        )
    address = _HOSTS.get(domain, domain)
    try:
        url = URL(f"//{address}")
        scheme = default_scheme or ("http" if _is_loopback(url.host or "") else "https")
        return URL.build(scheme=scheme, authority=address)
    except ValueError as error:
        raise InvalidArgument(
            f"{domain!r} is no address of a registry", field="reference"
        ) from error


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


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
