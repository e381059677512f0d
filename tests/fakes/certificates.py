"""Certificates of an authority of the test's own, made by openssl(1)."""

from __future__ import annotations

import ssl
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_NAMES = "subjectAltName=IP:127.0.0.1,DNS:localhost"


@dataclass(frozen=True)
class Certificates:
    """Files of an authority, a server on the loopback and a client, all below one directory."""

    directory: Path

    @property
    def authority(self) -> Path:
        return self.directory / "authority.pem"

    def certificate(self, name: str) -> Path:
        return self.directory / f"{name}.pem"

    def key(self, name: str) -> Path:
        return self.directory / f"{name}.key"

    def server(self, *, wants_client: bool = False) -> ssl.SSLContext:
        """What a server needs; it may ask for a certificate of the same authority."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.certificate("server"), self.key("server"))
        if wants_client:
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(self.authority)
        return context


def make_certificates(directory: Path) -> Certificates:
    """An authority, and a certificate of it for a server and for a client."""
    made = Certificates(directory)
    _openssl(made, "authority", "-x509", "-subj", "/CN=test authority")
    for name in ("server", "client"):
        _openssl(
            made,
            name,
            *("-x509", "-CA", str(made.authority), "-CAkey", str(made.key("authority"))),
            *("-subj", f"/CN={name}", "-addext", _NAMES),
        )
    return made


def _openssl(made: Certificates, name: str, *arguments: str) -> None:
    subprocess.run(
        [
            *("openssl", "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-noenc"),
            *("-keyout", str(made.key(name)), "-out", str(made.certificate(name))),
            *("-days", "2", *arguments),
        ],
        check=True,
        capture_output=True,
        timeout=20,
    )
