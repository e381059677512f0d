"""Authorization at registries: basic, or a bearer token from the server that the registry names.

A registry that wants to know who asks answers 401 with a challenge (RFC 9110, 11.6.1). For Bearer
the challenge names a realm, which gives a token for a scope such as
``repository:library/alpine:pull`` (distribution's "Token Authentication Specification"). Tokens are
kept until they expire.
"""

from __future__ import annotations

import base64
import json
import re
import time
from typing import TYPE_CHECKING, Any

from yarl import URL

from services.common.errors import DataLoss, FailedPrecondition, Unauthenticated, Unavailable
from services.common.frozen import frozen
from services.containerd.keyed_lock import KeyedLock
from services.containerd.remotes.body import bytes_body
from services.containerd.remotes.http import SYSTEM_TRANSPORT, read_bounded
from services.containerd.remotes.remote import Credentials

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from services.containerd.remotes.http import HttpClient, Transport
    from services.containerd.remotes.remote import RegistryAccess

_ANSWER_MAX_BYTES = 1 << 20
_DEFAULT_LIFETIME_S = 60  # what the specification says where the server does not
_SAFETY_S = 5  # a token is not used so shortly before its end
_CLIENT_ID = "theseus"

_SCHEME = re.compile(r"\s*,?\s*([A-Za-z0-9!#$%&'*+.^_`|~-]+)(?:\s+|$)")
_PARAMETER = re.compile(
    r"""\s*,?\s*([A-Za-z0-9!#$%&'*+.^_`|~-]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,"]+))"""
)


@frozen
class Challenge:
    """One way to authorize that a server offers; the scheme is lower case."""

    scheme: str
    parameters: Mapping[str, str]


@frozen
class _Token:
    header: str
    expires_at_s: float


def parse_challenges(values: Iterable[str]) -> list[Challenge]:
    """The challenges of WWW-Authenticate headers; what does not parse is left out."""
    found = []
    for value in values:
        position = 0
        while match := _SCHEME.match(value, position):
            scheme, position = match.group(1).lower(), match.end()
            parameters: dict[str, str] = {}
            while parameter := _PARAMETER.match(value, position):
                name, quoted, plain = parameter.groups()
                text = plain if quoted is None else re.sub(r"\\(.)", r"\1", quoted)
                parameters[name.lower()] = text
                position = parameter.end()
            found.append(Challenge(scheme, parameters))
    return found


class Authorizer:
    """Gets and keeps what one client shows to registries."""

    def __init__(
        self, http: HttpClient, access: RegistryAccess, transport: Transport = SYSTEM_TRANSPORT
    ) -> None:
        self._http = http
        self._access = access
        self._transport = transport
        self._tokens: dict[tuple[str, str], _Token] = {}
        self._asking: KeyedLock[tuple[str, str]] = KeyedLock()

    def header(self, host: str, scope: str) -> str:
        """The Authorization header to send, as far as it is known; or empty."""
        token = self._tokens.get((host, scope))
        if token is None or token.expires_at_s < time.monotonic():
            return ""
        return token.header

    async def answer(self, url: URL, challenges: list[Challenge], scope: str, sent: str) -> str:
        """The Authorization header that meets the challenge of a 401.

        Args:
            url: what was asked for.
            challenges: what the server offers.
            scope: what the token has to be good for.
            sent: the header that was refused; empty: there was none.

        Raises:
            Unauthenticated: there are no credentials to show, or they were refused.
        """
        host = url.authority
        async with self._asking.hold((host, scope)):
            known = self.header(host, scope)
            if known and known != sent:
                return known  # another request has got it meanwhile
            token = await self._fetch(url, challenges, scope)
            if token.header == sent:
                raise Unauthenticated(f"{host} refused the credentials for {scope or 'its API'}")
            self._tokens[host, scope] = token
            return token.header

    async def _fetch(self, url: URL, challenges: list[Challenge], scope: str) -> _Token:
        host = url.authority
        credentials = await self._credentials(host)
        if credentials.header:
            return _Token(credentials.header, float("inf"))
        for challenge in challenges:
            if challenge.scheme == "bearer":
                return await self._bearer(url, challenge, scope, credentials)
            if challenge.scheme == "basic" and credentials.username:
                return _Token(_basic(credentials), float("inf"))
        if any(challenge.scheme == "basic" for challenge in challenges):
            raise Unauthenticated(f"{host} wants a user name and a password: give credentials")
        offered = ", ".join(challenge.scheme for challenge in challenges) or "nothing"
        raise Unauthenticated(
            f"{host} wants authorization by a scheme that is not supported: it offers {offered}"
        )

    async def _credentials(self, host: str) -> Credentials:
        if self._access.credentials is None:
            return Credentials()
        return await self._access.credentials(host)

    async def _bearer(
        self, url: URL, challenge: Challenge, scope: str, credentials: Credentials
    ) -> _Token:
        realm = _realm(url, challenge)
        fields = {"service": challenge.parameters.get("service", "")}
        fields["scope"] = scope or challenge.parameters.get("scope", "")
        fields = {key: value for key, value in fields.items() if value}
        if credentials.refresh_token:
            fields |= {
                "grant_type": "refresh_token",
                "client_id": _CLIENT_ID,
                "refresh_token": credentials.refresh_token,
            }
            form = URL.build(query=fields).raw_query_string.encode()
            headers = {
                "Content-Type": "application/x-www-form-urlencoded",
                "Content-Length": str(len(form)),
            }
            answer = await self._ask("POST", realm, headers, form)
        else:
            headers = {"Authorization": _basic(credentials)} if credentials.username else {}
            answer = await self._ask("GET", realm.update_query(fields), headers, None)
        token = answer.get("token") or answer.get("access_token")
        if not isinstance(token, str) or not token.isprintable():
            raise DataLoss(f"{realm.host} answered without a token")
        lifetime = answer.get("expires_in", 0)
        lifetime_s = lifetime if isinstance(lifetime, int) and lifetime > 0 else _DEFAULT_LIFETIME_S
        return _Token(f"Bearer {token}", time.monotonic() + max(lifetime_s - _SAFETY_S, _SAFETY_S))

    async def _ask(
        self, method: str, url: URL, headers: Mapping[str, str], form: bytes | None
    ) -> dict[str, Any]:
        body = None if form is None else bytes_body(form)
        async with self._http.request(
            method, url, headers=headers, body=body, transport=self._transport
        ) as response:
            if response.status in (400, 401, 403):
                raise Unauthenticated(
                    f"{url.host} gave no token: the credentials are wrong, or the repository does "
                    f"not exist (status {response.status})"
                )
            if response.status != 200:
                raise Unavailable(f"{url.host} gave no token (status {response.status})")
            data = await read_bounded(response, _ANSWER_MAX_BYTES)
        try:
            answer = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise DataLoss(f"{url.host} answered with what is no JSON") from error
        if not isinstance(answer, dict):
            raise DataLoss(f"{url.host} answered with what is no JSON object")
        return answer


def _realm(url: URL, challenge: Challenge) -> URL:
    try:
        realm = URL(challenge.parameters.get("realm", ""))
    except ValueError:
        realm = URL()
    if realm.scheme not in ("http", "https") or not realm.host:
        raise FailedPrecondition(f"{url.authority} names no server that gives tokens")
    if url.scheme == "https" and realm.scheme != "https":
        raise FailedPrecondition(
            f"{url.authority} wants credentials sent to {realm.host} without TLS: refused"
        )
    return realm


def _basic(credentials: Credentials) -> str:
    pair = f"{credentials.username}:{credentials.secret}".encode()
    return f"Basic {base64.b64encode(pair).decode()}"
