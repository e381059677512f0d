"""Between our mounts and ``containerd.types.Mount``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from protos.containerd.types import mount_pb2
from services.common.mounts import Mount

if TYPE_CHECKING:
    from collections.abc import Iterable


def to_mounts(mounts: Iterable[Mount]) -> list[mount_pb2.Mount]:
    """Mounts on the wire."""
    return [
        mount_pb2.Mount(
            type=mount.type, source=mount.source, target=mount.target, options=mount.options
        )
        for mount in mounts
    ]


def from_mounts(messages: Iterable[mount_pb2.Mount]) -> list[Mount]:
    """Mounts off the wire."""
    return [
        Mount(message.type, message.source, message.target, tuple(message.options))
        for message in messages
    ]
