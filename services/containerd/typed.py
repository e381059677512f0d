"""A message that containerd keeps and hands on without looking inside, and how a row keeps it."""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING

from services.common.frozen import frozen

if TYPE_CHECKING:
    from collections.abc import Mapping


@frozen
class TypedValue:
    """Some bytes and the name of their type, as ``google.protobuf.Any`` carries them.

    Attributes:
        type_url: what the bytes are; containerd's own have no ``type.googleapis.com/`` before them.
        value: the bytes.
    """

    type_url: str
    value: bytes


NO_VALUE = TypedValue("", b"")
"""Stands for none in two columns of a row; as an extension, for one that is to go."""


def to_columns(value: TypedValue | None) -> tuple[str, bytes]:
    """Type and bytes, as two columns keep them."""
    value = value or NO_VALUE
    return value.type_url, value.value


def from_columns(type_url: str, value: bytes) -> TypedValue | None:
    """What :func:`to_columns` made columns of."""
    found = TypedValue(type_url, value)
    return None if found == NO_VALUE else found


def to_plain(values: Mapping[str, TypedValue]) -> dict[str, tuple[str, str]]:
    """Values by name, as plain data that JSON can carry."""
    return {
        name: (value.type_url, base64.b64encode(value.value).decode())
        for name, value in values.items()
    }


def from_json(text: str) -> dict[str, TypedValue]:
    """The values whose plain data (:func:`to_plain`) a column has as JSON."""
    return {
        name: TypedValue(type_url, base64.b64decode(value))
        for name, (type_url, value) in json.loads(text).items()
    }
