"""Which hosts serve a registry's images, from directories laid out as containerd's ``config_path``.

    <directory>/<domain>/hosts.toml        domain: registry.example, registry.example_5000_ (which
                        *.crt              stands for :5000), registry.example:5000, or _default
                        *.cert, *.key      docker's layout, where there is no hosts.toml

The first of these that exists counts. It is read anew for every transfer, so a change needs no
restart. A file that makes no sense fails the transfer, naming file and key: to go on without it
would ask the very host that it may be there to keep us from.
"""

from __future__ import annotations

import posixpath
import re
import tomllib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import structlog
from yarl import URL

from services.common.errors import FailedPrecondition
from services.containerd.durations import parse_duration
from services.containerd.remotes.endpoint import (
    ALL_CAPABILITIES,
    Capability,
    Endpoint,
    TlsSettings,
    own_endpoint,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

log = structlog.get_logger(__name__)

HOSTS_FILE = "hosts.toml"
_DEFAULT = "_default"
_KEYS = frozenset(
    {"capabilities", "ca", "client", "skip_verify", "header", "override_path", "dial_timeout"}
)
_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")  # RFC 9110, 5.1


def find_endpoints(
    directories: Sequence[Path], domain: str, default_scheme: str = ""
) -> list[Endpoint]:
    """The hosts to ask for the images of a domain, in this order. Reads files.

    Args:
        directories: where to look, the first one first.
        domain: of a reference.
        default_scheme: of the domain's own host, as ``own_endpoint`` takes it.

    Raises:
        FailedPrecondition: a file cannot be read or understood.
        InvalidArgument: the domain, or the scheme, makes no sense.
    """
    directory = _host_directory(directories, domain)
    if directory is None:
        return [own_endpoint(domain, default_scheme)]
    path = directory / HOSTS_FILE
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return [own_endpoint(domain, default_scheme, _certificates(directory))]
    except OSError as error:
        raise FailedPrecondition(f"{path} cannot be read: {error.strerror}") from error
    try:
        document = tomllib.loads(data.decode())
    except ValueError as error:
        raise FailedPrecondition(f"{path} is not TOML: {error}") from error
    return _HostsFile(path, document).endpoints(domain, default_scheme)


def _host_directory(directories: Sequence[Path], domain: str) -> Path | None:
    host, colon, port = domain.rpartition(":")
    names = [f"{host}_{port}_"] if colon and host else []
    for directory in directories:
        for name in (*names, domain, _DEFAULT):
            # A domain has no slash; one of dots alone would lead out of the directory.
            if name.strip(".") and (directory / name).is_dir():
                return directory / name
    return None


def _certificates(directory: Path) -> TlsSettings:
    try:
        files = sorted(path for path in directory.iterdir() if path.is_file())
    except OSError as error:
        raise FailedPrecondition(f"{directory} cannot be read: {error.strerror}") from error
    identities = []
    for path in files:
        if path.suffix == ".cert":
            key = path.with_suffix(".key")
            identities.append((path, key if key in files else None))
    authorities = tuple(path for path in files if path.suffix == ".crt")
    return TlsSettings(authorities, tuple(identities))


class _HostsFile:
    """A hosts.toml that was parsed: mirrors by their URLs, then the domain's own host."""

    def __init__(self, path: Path, document: Mapping[str, Any]) -> None:
        self._path = path
        self._document = document

    def endpoints(self, domain: str, default_scheme: str) -> list[Endpoint]:
        hosts = self._document.get("host", {})
        if not isinstance(hosts, dict):
            raise self._wrong("host", 'is no table: write [host."https://mirror.example"]')
        found = []
        for address, table in hosts.items():  # tomllib keeps the file's order
            where = f'host."{address}"'
            if not isinstance(table, dict):
                raise self._wrong(where, "is no table")
            self._note_unknown(where, table, _KEYS)
            found.append(self._endpoint(address, where, table))
        self._note_unknown("the file", self._document, _KEYS | {"server", "host"})
        server = self._document.get("server", "")
        if not isinstance(server, str):
            raise self._wrong("server", "is no text")
        if server:
            last = self._endpoint(server, "server", self._document)
        else:
            # Every capability, as in containerd: to forbid something one names the server.
            last = replace(
                own_endpoint(domain, default_scheme, self._tls("", self._document)),
                headers=self._headers("", self._document),
                connect_timeout_s=self._duration("", self._document),
            )
        own_host = own_endpoint(domain, default_scheme).root.authority
        return [
            replace(each, stands_for="" if each.root.authority in (domain, own_host) else domain)
            for each in (*found, last)
        ]

    def _endpoint(self, address: str, where: str, table: Mapping[str, Any]) -> Endpoint:
        prefix = "" if where == "server" else where
        override = self._flag(prefix, table, "override_path")
        return Endpoint(
            root=self._root(address, where, override=override),
            capabilities=self._capabilities(prefix, table),
            headers=self._headers(prefix, table),
            tls=self._tls(prefix, table),
            connect_timeout_s=self._duration(prefix, table),
        )

    def _root(self, address: str, where: str, *, override: bool) -> URL:
        text = address if "://" in address else f"https://{address}"
        try:
            url = URL(text)
        except ValueError:
            url = URL()
        if url.scheme not in ("http", "https") or not url.host or url.query_string or url.fragment:
            raise self._wrong(where, f"has {address!r}, which is no address of a registry")
        path = posixpath.normpath(url.path) if url.path.strip("/") else ""
        if not override and not path.endswith("/v2"):
            path += "/v2"
        return url.origin().with_path(path or "/")

    def _capabilities(self, where: str, table: Mapping[str, Any]) -> frozenset[Capability]:
        names = table.get("capabilities", [])
        if not isinstance(names, list):
            raise self._wrong(_join(where, "capabilities"), "is no list")
        try:
            return frozenset(Capability(str(name).lower()) for name in names) or ALL_CAPABILITIES
        except ValueError:
            known = ", ".join(Capability)
            raise self._wrong(
                _join(where, "capabilities"), f"has {names!r}: there are {known}"
            ) from None

    def _headers(self, where: str, table: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
        key = _join(where, "header")
        headers = table.get("header", {})
        if not isinstance(headers, dict):
            raise self._wrong(key, "is no table")
        pairs = []
        for name, value in headers.items():
            for each in value if isinstance(value, list) else [value]:
                if (
                    not isinstance(each, str)
                    or not (each.isprintable() and each.isascii())
                    or not _HEADER_NAME.fullmatch(name)
                ):
                    raise self._wrong(f"{key}.{name}", "is neither a text nor a list of texts")
                pairs.append((name, each))
        return tuple(pairs)

    def _tls(self, where: str, table: Mapping[str, Any]) -> TlsSettings:
        return TlsSettings(
            authorities=self._authorities(where, table),
            identities=self._identities(where, table),
            skip_verify=self._flag(where, table, "skip_verify"),
        )

    def _authorities(self, where: str, table: Mapping[str, Any]) -> tuple[Path, ...]:
        given = table.get("ca", [])
        files = [given] if isinstance(given, str) else given
        if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
            raise self._wrong(_join(where, "ca"), "is neither a file nor a list of files")
        return tuple(self._path.parent / file for file in files)

    def _identities(
        self, where: str, table: Mapping[str, Any]
    ) -> tuple[tuple[Path, Path | None], ...]:
        given = table.get("client", [])
        found: list[tuple[Path, Path | None]] = []
        for item in given if isinstance(given, list) else [given]:
            match item:
                case str():
                    found.append((self._path.parent / item, None))
                case [str(certificate), str(key)]:
                    found.append((self._path.parent / certificate, self._path.parent / key))
                case _:
                    raise self._wrong(
                        _join(where, "client"),
                        "is neither a file, nor a list of files or of pairs [certificate, key]",
                    )
        return tuple(found)

    def _flag(self, where: str, table: Mapping[str, Any], key: str) -> bool:
        value = table.get(key, False)
        if not isinstance(value, bool):
            raise self._wrong(_join(where, key), "is neither true nor false")
        return value

    def _duration(self, where: str, table: Mapping[str, Any]) -> float | None:
        value = table.get("dial_timeout", "")
        if value == "":
            return None
        seconds = parse_duration(value) if isinstance(value, str) else None
        if seconds is None:
            raise self._wrong(_join(where, "dial_timeout"), f"is {value!r}: write it as in '5s'")
        return seconds

    def _note_unknown(self, where: str, table: Mapping[str, Any], known: frozenset[str]) -> None:
        for key in table.keys() - known:
            log.warning("key is not known", file=str(self._path), table=where, key=key)

    def _wrong(self, key: str, problem: str) -> FailedPrecondition:
        return FailedPrecondition(f"{self._path}: {key} {problem}")


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key
