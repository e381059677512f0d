"""References as users write them, and the full form under which containerd has them.

    busybox            docker.io/library/busybox:latest
    host:5000/a/b:tag  host:5000/a/b:tag
    name@sha256:...    docker.io/library/name@sha256:...

The grammar is that of the distribution project: a first component is a host when it has a dot or a
colon, or is ``localhost``, or has a capital letter.
"""

from __future__ import annotations

import re

from services.common.errors import InvalidArgument
from services.common.frozen import frozen

_DEFAULT_HOST = "docker.io"
_OFFICIAL = "library/"
_DEFAULT_TAG = "latest"
_HOST = re.compile(
    r"(?:[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?"
    r"(?:\.[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?)*|\[[0-9a-fA-F:]+\])(?::[0-9]+)?"
)
_PATH = re.compile(
    r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*"
)
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_DIGEST = re.compile(r"[a-z0-9]+(?:[.+_-][a-z0-9]+)*:[0-9a-fA-F]{32,}")
_ID = re.compile(r"(?:sha256:)?[0-9a-f]{1,64}")
_NAME_MAX = 255
_SHA256_HEX = 64


@frozen
class Reference:
    """A full reference. ``tag`` or ``digest`` or both are set."""

    host: str
    path: str
    tag: str = ""
    digest: str = ""

    @property
    def name(self) -> str:
        """Without tag and digest."""
        return f"{self.host}/{self.path}"

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag and not self.digest else ""
        digest = f"@{self.digest}" if self.digest else ""
        return f"{self.name}{tag}{digest}"

    @property
    def familiar(self) -> str:
        """As users write it: without the default host and the official prefix."""
        short = str(self)
        if self.host == _DEFAULT_HOST:
            short = short.removeprefix(f"{_DEFAULT_HOST}/").removeprefix(_OFFICIAL)
        return short


def parse(text: str) -> Reference:
    """Read a reference; what is left out takes its default.

    Raises:
        InvalidArgument: it does not follow the grammar.
    """
    rest, at, digest = text.partition("@")
    if at and not _digest_ok(digest):
        raise _invalid(text, "the digest is malformed")
    head, slash, tail = rest.rpartition("/")
    tail, colon, tag = tail.partition(":")
    if colon and not _TAG.fullmatch(tag):
        raise _invalid(text, "the tag is malformed")
    host, path = _split_host(head + slash + tail)
    if not _PATH.fullmatch(path):
        if path != path.lower() and _PATH.fullmatch(path.lower()):
            raise _invalid(text, "repository name must be lowercase")
        raise _invalid(text, "the repository name is malformed")
    if not _HOST.fullmatch(host):
        raise _invalid(text, "the registry's host name is malformed")
    if len(host) + 1 + len(path) > _NAME_MAX:
        raise _invalid(text, f"the repository name has more than {_NAME_MAX} characters")
    if _ID.fullmatch(text) and len(text) == _SHA256_HEX:
        raise _invalid(text, "cannot specify 64-byte hexadecimal strings")
    if not tag and not digest:
        tag = _DEFAULT_TAG
    return Reference(host, path, tag, digest)


def id_prefix(text: str) -> str:
    """The hex digits of what may be an image's id or the beginning of one; else empty."""
    return text.removeprefix("sha256:") if _ID.fullmatch(text) else ""


def _split_host(name: str) -> tuple[str, str]:
    first, slash, rest = name.partition("/")
    is_host = slash and (
        "." in first or ":" in first or first == "localhost" or first != first.lower()
    )
    host, path = (first, rest) if is_host else (_DEFAULT_HOST, name)
    if host == "index.docker.io":
        host = _DEFAULT_HOST
    if host == _DEFAULT_HOST and "/" not in path:
        path = f"{_OFFICIAL}{path}"
    return host, path


def _digest_ok(digest: str) -> bool:
    algorithm, _, value = digest.partition(":")
    if not _DIGEST.fullmatch(digest):
        return False
    return algorithm != "sha256" or (len(value) == _SHA256_HEX and value == value.lower())


def _invalid(text: str, why: str) -> InvalidArgument:
    return InvalidArgument(f"invalid reference format: '{text}': {why}", field="reference")
