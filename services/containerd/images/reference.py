"""Names of images: ``[domain/]path[:tag][@digest]``, by the grammar of the distribution project.

containerd itself takes full references only, as ``parse_reference`` reads them. The short names
that people type, and that archives carry, go through ``parse_familiar_name`` first:

    alpine            ->  docker.io/library/alpine:latest
    somebody/tool:1   ->  docker.io/somebody/tool:1
    localhost/x       ->  localhost/x:latest
"""

from __future__ import annotations

import re
from dataclasses import replace

from services.common.errors import InvalidArgument
from services.common.frozen import frozen
from services.containerd.content.digest import is_digest, split_digest

DEFAULT_DOMAIN = "docker.io"
DEFAULT_TAG = "latest"

_LEGACY_DOMAIN = "index.docker.io"
_OFFICIAL_PREFIX = "library/"
_PATH_MAX_CHARS = 255
_REFERENCE_MAX_CHARS = 1024

_LABEL = r"(?:[a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9])"
_DOMAIN = rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[a-fA-F0-9:]+\])(?::[0-9]+)?"
_COMPONENT = r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*"
_NAME = re.compile(rf"(?:({_DOMAIN})/)?({_COMPONENT}(?:/{_COMPONENT})*)")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_IDENTIFIER = re.compile(r"[0-9a-f]{64}")


@frozen
class Reference:
    """A parsed name. ``str()`` gives it back as it is written.

    Attributes:
        domain: host of the registry, with its port if it has one; empty: none was named.
        path: the repository in that registry.
        tag: without the colon; empty: none.
        digest: without the at sign; empty: none.
    """

    domain: str
    path: str
    tag: str = ""
    digest: str = ""

    @property
    def name(self) -> str:
        """Domain and path, without tag and digest."""
        return f"{self.domain}/{self.path}" if self.domain else self.path

    @property
    def object(self) -> str:
        """What to ask the registry for: the digest if there is one, or else the tag."""
        return self.digest or self.tag

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        digest = f"@{self.digest}" if self.digest else ""
        return f"{self.name}{tag}{digest}"


def parse_reference(text: str) -> Reference:
    """Read a full reference.

    Raises:
        InvalidArgument: it does not follow the grammar; says which part.
    """
    if not text:
        raise _invalid(text, "it is empty")
    if len(text) > _REFERENCE_MAX_CHARS:
        raise _invalid(text, f"it has more than {_REFERENCE_MAX_CHARS} characters")
    if "://" in text:
        raise _invalid(text, "it must not begin with a scheme such as https://")
    rest, at, digest = text.partition("@")
    if at and not is_digest(digest):
        try:
            split_digest(digest, field="reference")
        except InvalidArgument as error:
            raise _invalid(text, error.message) from None
    name, tag = _split_tag(rest)
    match = _NAME.fullmatch(name)
    if match is None:
        raise _invalid(text, _reason(name))
    if tag is not None and not _TAG.fullmatch(tag):
        raise _invalid(
            text,
            "a tag is 1 to 128 letters, digits, '_', '.' and '-', and begins with one of "
            "the first three",
        )
    domain, path = match.group(1) or "", match.group(2)
    if len(path) > _PATH_MAX_CHARS:
        raise _invalid(text, f"the repository has more than {_PATH_MAX_CHARS} characters")
    return Reference(domain, path, tag or "", digest)


def parse_familiar_name(text: str) -> Reference:
    """Read a name as people type it; fills in domain, ``library/`` and tag.

    With both a tag and a digest the digest wins, and the tag is dropped.

    Raises:
        InvalidArgument: it is no name, or 64 hex digits, which would be an id.
    """
    if _IDENTIFIER.fullmatch(text):
        raise _invalid(text, "64 hexadecimal digits name an image by id, not a repository")
    first, slash, rest = text.partition("/")
    looks_like_domain = (
        first == "localhost" or any(c in first for c in ".:") or first != first.lower()
    )
    domain, path = (first, rest) if slash and looks_like_domain else (DEFAULT_DOMAIN, text)
    if domain == _LEGACY_DOMAIN:
        domain = DEFAULT_DOMAIN
    if domain == DEFAULT_DOMAIN and path and "/" not in path:
        path = _OFFICIAL_PREFIX + path
    try:
        reference = parse_reference(f"{domain}/{path}" if path else "")
    except InvalidArgument as error:
        raise _invalid(text, error.message.partition(": ")[2] or error.message) from None
    if reference.digest:
        return replace(reference, tag="")
    return replace(reference, tag=reference.tag or DEFAULT_TAG)


def familiar_name(reference: Reference) -> str:
    """The shortest name that ``parse_familiar_name`` reads as ``reference``, its tag kept."""
    if reference.domain != DEFAULT_DOMAIN:
        return str(reference)
    path = reference.path
    if path.startswith(_OFFICIAL_PREFIX) and "/" not in path.removeprefix(_OFFICIAL_PREFIX):
        path = path.removeprefix(_OFFICIAL_PREFIX)
    return str(replace(reference, domain="", path=path))


def oci_ref_name(name: str) -> str:
    """Value of ``org.opencontainers.image.ref.name`` for an image: its tag, or else the full name.

    ``name`` need not be a reference: images are called what their creator likes.
    """
    rest, at, digest = name.partition("@")
    _, tag = _split_tag(rest)
    return f"{tag}{at}{digest}" if tag else name


def _split_tag(text: str) -> tuple[str, str | None]:
    # A colon in what comes before the last slash belongs to a port.
    colon = text.rfind(":")
    if colon > text.rfind("/"):
        return text[:colon], text[colon + 1 :]
    return text, None


def _reason(name: str) -> str:
    if not name:
        return "it has no repository"
    if name.lower() != name and _NAME.fullmatch(name.lower()):
        return "the repository must be lower case"
    return (
        "want [domain/]path[:tag][@digest], the path of lower-case letters and digits, with single "
        "'.', '_', '__' or '-' between them"
    )


def _invalid(text: str, why: str) -> InvalidArgument:
    return InvalidArgument(f"invalid image reference {text[:300]!r}: {why}", field="reference")
