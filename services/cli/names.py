"""Image references as users read them."""

from __future__ import annotations

_DEFAULT_REGISTRY = "docker.io/"
_DEFAULT_PATH = "library/"


def familiar(reference: str) -> str:
    """A full reference without what it has by default, but with its tag."""
    if not reference.startswith(_DEFAULT_REGISTRY):
        return reference
    return reference.removeprefix(_DEFAULT_REGISTRY).removeprefix(_DEFAULT_PATH)


def split(reference: str) -> tuple[str, str, str]:
    """Repository, tag and digest of a reference; what it lacks is empty."""
    rest, _, digest = reference.partition("@")
    head, colon, tag = rest.rpartition(":")
    if not colon or "/" in tag:  # the colon was a port's
        head, tag = rest, ""
    return head, tag, digest
