"""HTTP to registries: time limits, bounded redirects, and failures in words.

Nothing here retries, and nothing knows what a registry is. aiohttp is imported, in a thread, for
the first request: it is a third of what a start of the service would take, and eight megabytes.
"""

from __future__ import annotations

import asyncio
import importlib
import ssl
from contextlib import asynccontextmanager, contextmanager
from http import HTTPStatus
from typing import TYPE_CHECKING, Self

from multidict import CIMultiDict
from yarl import URL

from services.common.errors import FailedPrecondition, ResourceExhausted, Unavailable
from services.common.frozen import frozen

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
    from types import TracebackType

    import aiohttp

    from services.containerd.remotes.body import Body

READ_BUFFER_BYTES = 256 << 10
"""What may be lost of a response that breaks off: twice as much, and it is fetched again."""

_REDIRECTS = frozenset(
    {
        HTTPStatus.MOVED_PERMANENTLY,
        HTTPStatus.FOUND,
        HTTPStatus.SEE_OTHER,
        HTTPStatus.TEMPORARY_REDIRECT,
        HTTPStatus.PERMANENT_REDIRECT,
    }
)


@frozen
class HttpLimits:
    """Bounds of one request.

    Attributes:
        connect_timeout_s: for a connection to be made, TLS included.
        read_timeout_s: without a byte from the other side.
        redirects: followed one after another.
        connections_per_host: open at once.
    """

    connect_timeout_s: float = 15
    read_timeout_s: float = 30
    redirects: int = 5
    connections_per_host: int = 16


@frozen
class Transport:
    """How connections to a host, and to those that it sends us to, are made.

    Attributes:
        tls: what is trusted and shown; None: the system's authorities, and nothing.
        connect_timeout_s: as in :class:`HttpLimits`; None: that one.
    """

    tls: ssl.SSLContext | None = None
    connect_timeout_s: float | None = None


SYSTEM_TRANSPORT = Transport()


class HttpClient:
    """A pool of connections, to be used as an async context manager.

    Proxies come from the environment.
    """

    def __init__(self, limits: HttpLimits, *, user_agent: str) -> None:
        self._limits = limits
        self._user_agent = user_agent
        self._session: aiohttp.ClientSession | None = None
        self._open = False
        self._opening = asyncio.Lock()

    async def __aenter__(self) -> Self:
        self._open = True
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._open = False
        async with self._opening:
            if self._session is not None:
                await self._session.close()
                self._session = None

    async def _opened(self) -> aiohttp.ClientSession:
        """The pool, made when it is first needed."""
        assert self._open, "the client is used inside its context only"
        async with self._opening:
            if self._session is None:
                await asyncio.to_thread(importlib.import_module, "aiohttp")
                import aiohttp

                limit = self._limits.connections_per_host
                self._session = aiohttp.ClientSession(
                    connector=aiohttp.TCPConnector(limit=0, limit_per_host=limit),
                    # A digest is of the bytes as they are stored: nothing packs or unpacks them on
                    # the way.
                    headers={"User-Agent": self._user_agent, "Accept-Encoding": "identity"},
                    auto_decompress=False,
                    read_bufsize=READ_BUFFER_BYTES,
                    cookie_jar=aiohttp.DummyCookieJar(),
                    trust_env=True,
                )
            return self._session

    @asynccontextmanager
    async def request(
        self,
        method: str,
        url: URL,
        *,
        headers: Mapping[str, str],
        own_headers: Sequence[tuple[str, str]] = (),
        body: Body | None = None,
        transport: Transport = SYSTEM_TRANSPORT,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Send a request; the response is open inside the block, whatever its status.

        Redirects are followed for requests without a body.

        Args:
            method: of HTTP.
            url: where to.
            headers: to send; Authorization stays with the host of ``url``.
            own_headers: further ones for the host of ``url`` alone.
            body: to send.
            transport: for every connection that this takes.

        Raises:
            Unavailable: no connection, or it broke or fell silent; inside the block too.
            FailedPrecondition: a redirect that is not followed, or no proper certificate.
        """
        session = await self._opened()
        import aiohttp

        limits = self._limits
        sent = CIMultiDict([*headers.items(), *own_headers])
        timeout = aiohttp.ClientTimeout(
            total=None,
            sock_connect=transport.connect_timeout_s or limits.connect_timeout_s,
            sock_read=limits.read_timeout_s,
        )
        start = url
        for _ in range(limits.redirects + 1):
            with _in_words(url):
                async with session.request(
                    method,
                    url,
                    headers=sent,
                    data=None if body is None else body.chunks(),
                    allow_redirects=False,
                    ssl=True if transport.tls is None else transport.tls,
                    timeout=timeout,
                ) as response:
                    location = response.headers.get("Location")
                    if body is not None or response.status not in _REDIRECTS or not location:
                        yield response
                        return
            target = _redirected(url, location)
            if target.origin() != url.origin():
                for name in ("Authorization", *(name for name, _ in own_headers)):
                    sent.popall(name, None)
            url = target
        raise FailedPrecondition(
            f"{start.host} redirects more than {limits.redirects} times: {start.path} leads "
            f"to {url.with_query(None)}"
        )


async def read_bounded(response: aiohttp.ClientResponse, max_bytes: int) -> bytes:
    """The body of a response.

    Raises:
        ResourceExhausted: it has more than ``max_bytes``.
    """
    parts, total = [], 0
    async for part in response.content.iter_chunked(READ_BUFFER_BYTES):
        parts.append(part)
        total += len(part)
        if total > max_bytes:
            raise ResourceExhausted(
                f"{response.url.host} answered with more than {max_bytes} bytes to "
                f"{response.method} {response.url.path}"
            )
    return b"".join(parts)


def _redirected(url: URL, location: str) -> URL:
    try:
        target = url.join(URL(location))
    except ValueError as error:
        raise FailedPrecondition(f"{url.host} redirects to what is no URL") from error
    if target.scheme not in ("http", "https") or not target.host:
        raise FailedPrecondition(f"{url.host} redirects to the scheme {target.scheme!r}")
    if url.scheme == "https" and target.scheme == "http":
        raise FailedPrecondition(
            f"{url.host} redirects from https to http, to {target.host}: refused"
        )
    return target


@contextmanager
def _in_words(url: URL) -> Iterator[None]:
    import aiohttp

    where = f"{url.host}:{url.port}"
    try:
        yield
    except aiohttp.ServerTimeoutError as error:
        raise Unavailable(f"{where} did not answer in time") from error
    except (aiohttp.ClientConnectorCertificateError, ssl.CertificateError) as error:
        raise FailedPrecondition(
            f"the certificate of {where} is not trusted: add its authority to the system's, or "
            "name it in the registry's hosts.toml (ca)"
        ) from error
    except (aiohttp.ClientConnectorSSLError, ssl.SSLError) as error:
        raise FailedPrecondition(f"no TLS connection to {where}: {_tls_reason(error)}") from error
    except aiohttp.ClientConnectorError as error:
        raise Unavailable(f"cannot connect to {where}: {error.os_error}") from error
    except (aiohttp.ClientError, ConnectionError) as error:
        if isinstance(error.__cause__, ssl.SSLError):
            reason = _tls_reason(error.__cause__)
            raise FailedPrecondition(f"{where} ended the TLS connection: {reason}") from error
        raise Unavailable(f"the connection to {where} broke: {type(error).__name__}") from error


def _tls_reason(error: ssl.SSLError | aiohttp.ClientConnectorSSLError) -> str:
    cause = error if isinstance(error, ssl.SSLError) else error.os_error
    reason = getattr(cause, "reason", None) or cause.strerror or type(cause).__name__
    return str(reason).lower().replace("_", " ")
