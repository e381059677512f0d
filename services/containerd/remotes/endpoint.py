"""Where a registry's API is, what it is good for, and how a connection to it is made."""

from __future__ import annotations

import ipaddress
import ssl
from dataclasses import field
from enum import StrEnum
from typing import TYPE_CHECKING

from yarl import URL

from services.common.errors import FailedPrecondition, InvalidArgument
from services.common.frozen import frozen
from services.containerd.images.reference import DEFAULT_DOMAIN

if TYPE_CHECKING:
    from pathlib import Path

_HOSTS = {DEFAULT_DOMAIN: "registry-1.docker.io"}
"""Domains whose registry lives somewhere else."""


class Capability(StrEnum):
    """What a host may be asked for. A mirror that lags behind should not resolve tags."""

    PULL = "pull"
    RESOLVE = "resolve"
    PUSH = "push"
    REFERRERS = "referrers"


ALL_CAPABILITIES = frozenset(Capability)


@frozen
class TlsSettings:
    """What differs from the system's trust.

    Attributes:
        authorities: files of certificates that are trusted beside the system's.
        identities: files of our certificate and its key; None: the key is in the same file.
        skip_verify: trust whoever answers.
    """

    authorities: tuple[Path, ...] = ()
    identities: tuple[tuple[Path, Path | None], ...] = ()
    skip_verify: bool = False

    def context(self) -> ssl.SSLContext | None:
        """For connections; None: nothing differs. Reads files: not for the event loop.

        Raises:
            FailedPrecondition: a file cannot be read, or is no certificate or key.
        """
        if self == TlsSettings():
            return None
        context = ssl.create_default_context()
        if self.skip_verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        for path in self.authorities:
            try:
                context.load_verify_locations(path)
            except OSError as error:  # SSLError is one
                raise _unusable("authority's certificate", path, error) from error
        for certificate, key in self.identities:
            try:
                # A key that wants a passphrase must not make OpenSSL ask a terminal for it.
                context.load_cert_chain(certificate, key, password=lambda: "")
            except OSError as error:
                where = certificate if key is None else f"{certificate}, {key}"
                raise _unusable("client certificate", where, error) from error
        return context


@frozen
class Endpoint:
    """One host that serves a registry's images.

    Attributes:
        root: of its API, ``https://registry.example/v2``.
        capabilities: what it is asked for.
        headers: sent with every request, to this host only.
        tls: its TLS.
        connect_timeout_s: for a connection to be made; None: as everywhere.
        stands_for: the domain whose mirror it is; empty: it is that domain's own host.
    """

    root: URL
    capabilities: frozenset[Capability] = ALL_CAPABILITIES
    headers: tuple[tuple[str, str], ...] = ()
    tls: TlsSettings = field(default_factory=TlsSettings)
    connect_timeout_s: float | None = None
    stands_for: str = ""


def own_endpoint(domain: str, default_scheme: str = "", tls: TlsSettings | None = None) -> Endpoint:
    """The host that a domain names itself.

    Args:
        domain: of a reference, ``registry.example:5000``.
        default_scheme: ``http`` or ``https``; empty: http for loopback hosts without TLS settings,
            https for others.
        tls: settings for it.

    Raises:
        InvalidArgument: there is no domain, or the scheme is another one.
    """
    tls = tls or TlsSettings()
    if not default_scheme and tls != TlsSettings():
        default_scheme = "https"
    return Endpoint(registry_url(domain, default_scheme) / "v2", tls=tls)


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


def _unusable(what: str, where: object, error: OSError) -> FailedPrecondition:
    reason = error.reason if isinstance(error, ssl.SSLError) else error.strerror
    return FailedPrecondition(f"{what} {where} cannot be used: {reason or error}")
