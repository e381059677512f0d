"""A message that containerd keeps and hands on without looking inside."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TypedValue:
    """Some bytes and the name of their type, as ``google.protobuf.Any`` carries them.

    Attributes:
        type_url: what the bytes are; containerd's own have no ``type.googleapis.com/`` before them.
        value: the bytes.
    """

    type_url: str
    value: bytes
