"""Names of containers: made up, checked, and what a user may call a container by."""

from __future__ import annotations

import re
import secrets
from typing import TYPE_CHECKING

from services.common.errors import InvalidArgument, NotFound
from services.daemon.containers.words import SURNAMES, TRAITS

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]+")
_NAME_MAX = 255  # as long as a file's
_HEX = re.compile(r"[0-9a-f]{1,64}")


def new_id() -> str:
    """A fresh id: 64 hex digits, of which the first 12 are not all decimal.

    The short form serves as host name, and a name of digits alone would be taken for a number.
    """
    while True:
        identity = secrets.token_hex(32)
        if not identity[:12].isdigit():
            return identity


def new_name(attempt: int = 0) -> str:
    """A name such as ``plucky_noether``; after a few failed attempts with a number behind it."""
    name = f"{secrets.choice(TRAITS)}_{secrets.choice(SURNAMES)}"
    return f"{name}{secrets.randbelow(1000)}" if attempt > 2 else name


def check_name(name: str) -> str:
    """The name without the slash that users of docker put in front.

    Raises:
        InvalidArgument: characters that are not allowed, too short or too long.
    """
    bare = name.removeprefix("/")
    if not _NAME.fullmatch(bare) or len(bare) > _NAME_MAX:
        raise InvalidArgument(
            f"Invalid container name ({name}), only [a-zA-Z0-9][a-zA-Z0-9_.-] are allowed, "
            f"and 2 to {_NAME_MAX} of them",
            field="name",
        )
    return bare


def find(reference: str, *, ids: Collection[str], by_name: Mapping[str, str]) -> str:
    """The id of the container that a user means: by id, by name, then by a prefix of the id.

    Raises:
        InvalidArgument: nothing was named, or the prefix fits several.
        NotFound: there is no such container.
    """
    wanted = reference.removeprefix("/")
    if not wanted:
        raise InvalidArgument("a container's name or id is needed, none was given")
    if wanted in ids:
        return wanted
    if wanted in by_name:
        return by_name[wanted]
    prefix = _HEX.fullmatch(wanted) is not None
    found = [identity for identity in ids if prefix and identity.startswith(wanted)]
    if len(found) > 1:
        raise InvalidArgument(
            f"Multiple IDs found with provided prefix: {wanted}: give more digits of the id"
        )
    if not found:
        raise NotFound(f"No such container: {reference}", resource=("container", reference))
    return found[0]
