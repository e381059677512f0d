"""Digests: the names of blobs, ``<algorithm>:<hex>``, and how they are computed."""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING, Any

from services.common.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Iterable

CANONICAL_ALGORITHM = "sha256"
"""What is used where nobody asks for another one."""

_HEX_DIGITS = {"sha256": 64, "sha384": 96, "sha512": 128}
_DIGEST = re.compile(r"([a-z0-9]+(?:[.+_-][a-z0-9]+)*):([a-zA-Z0-9=_-]+)")


def split_digest(digest: str, *, field: str = "digest") -> tuple[str, str]:
    """The algorithm and the hex digits of a digest.

    Args:
        digest: what somebody claims to be one.
        field: the request field to blame.

    Raises:
        InvalidArgument: it is not a digest, or of an algorithm that is not supported.
    """
    match = _DIGEST.fullmatch(digest)
    if match is None:
        raise InvalidArgument(
            f"{digest[:200]!r} is not a digest: want <algorithm>:<hex>", field=field
        )
    algorithm, encoded = match.groups()
    digits = _HEX_DIGITS.get(algorithm)
    if digits is None:
        raise InvalidArgument(
            f"digest {digest[:200]!r} has an unsupported algorithm: "
            f"want one of {', '.join(_HEX_DIGITS)}",
            field=field,
        )
    if not re.fullmatch(f"[0-9a-f]{{{digits}}}", encoded):
        raise InvalidArgument(
            f"digest {digest[:200]!r} is malformed: {algorithm} has {digits} lower-case hex digits",
            field=field,
        )
    return algorithm, encoded


def is_digest(text: str) -> bool:
    """Whether ``text`` is a digest of a supported algorithm."""
    try:
        split_digest(text)
    except InvalidArgument:
        return False
    return True


def hasher(digest: str = "") -> Any:
    """A new hash object of the algorithm of ``digest``; of the canonical one if that is empty."""
    algorithm = split_digest(digest)[0] if digest else CANONICAL_ALGORITHM
    return hashlib.new(algorithm, usedforsecurity=False)


def digest_of(data: bytes, algorithm: str = CANONICAL_ALGORITHM) -> str:
    """The digest of some bytes."""
    return f"{algorithm}:{hashlib.new(algorithm, data, usedforsecurity=False).hexdigest()}"


def chain_ids(diff_ids: Iterable[str]) -> list[str]:
    """The chain ids of layers, lowest first, as OCI's image-spec (config.md) defines them.

    The id of the lowest is its diff id; every other one is the digest of the text
    ``<chain id below> <diff id>``.
    """
    chain: list[str] = []
    for diff_id in diff_ids:
        chain.append(digest_of(f"{chain[-1]} {diff_id}".encode()) if chain else diff_id)
    return chain
