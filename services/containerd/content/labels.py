"""Labels of blobs: the names that others read, and how a change is put together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.common.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

UNCOMPRESSED = "containerd.io/uncompressed"
"""On a layer: its diff id, the digest of the tar inside."""

DISTRIBUTION_SOURCE = "containerd.io/distribution.source."
"""On a blob, with a registry's host behind it: repositories there that have it, by commas."""

GC_REF_CONTENT = "containerd.io/gc.ref.content."
"""On an index or a manifest: the beginning of the labels that keep its children alive."""

GC_REF_SNAPSHOT = "containerd.io/gc.ref.snapshot."
"""On a configuration, with a snapshotter's name behind it: the topmost snapshot of the image."""

_MAX_BYTES = 4096


def changed_labels(
    current: Mapping[str, str], labels: Mapping[str, str], fields: Sequence[str]
) -> dict[str, str]:
    """The labels after an update with a field mask; ``ContentStore.update`` says which it takes.

    Raises:
        InvalidArgument: a path of the mask names no label, or a label is too long.
    """
    result = dict(current if fields else labels)
    for path in fields:
        if path == "labels":
            result = dict(labels)
        elif path.startswith("labels."):
            key = path.removeprefix("labels.")
            result[key] = labels.get(key, "")
        else:
            raise InvalidArgument(
                f"field {path!r} of content cannot be changed: only labels can", field="update_mask"
            )
    return checked_labels(result)


def checked_labels(labels: Mapping[str, str]) -> dict[str, str]:
    """The labels that are not empty.

    Raises:
        InvalidArgument: a key and its value have more than 4096 bytes together.
    """
    for key, value in labels.items():
        length = len(key.encode()) + len(value.encode())
        if length > _MAX_BYTES:
            raise InvalidArgument(
                f"label {key[:64]!r} and its value have {length} bytes, more than {_MAX_BYTES}",
                field="labels",
            )
    return {key: value for key, value in labels.items() if value}
