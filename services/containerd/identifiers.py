"""Names that clients choose for namespaces, containers and topics: one rule for all of them."""

from __future__ import annotations

import re

from services.common.errors import InvalidArgument

_MAX_LENGTH = 76
_IDENTIFIER = re.compile(r"[A-Za-z0-9]+(?:[._-][A-Za-z0-9]+)*")


def checked_identifier(text: str, *, what: str, field: str = "id") -> str:
    """``text``, if it may name something.

    Args:
        text: the name.
        what: the noun for the message: ``container id``.
        field: the request field to blame.

    Raises:
        InvalidArgument: it is empty, too long, or has other characters than letters, digits and
            single ``.``, ``_`` or ``-`` between them.
    """
    if not text:
        raise InvalidArgument(f"{what} must not be empty", field=field)
    if len(text) > _MAX_LENGTH:
        raise InvalidArgument(
            f"{what} {text[:_MAX_LENGTH]!r}... has {len(text)} characters, more than {_MAX_LENGTH}",
            field=field,
        )
    if not _IDENTIFIER.fullmatch(text):
        raise InvalidArgument(
            f"{what} {text!r} is malformed: letters and digits, "
            "with single '.', '_' or '-' between them",
            field=field,
        )
    return text
