"""Labels of blobs, set where they are not set yet."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from services.containerd.content.store import ContentStore


async def add_labels(
    content: ContentStore, namespace: str, digest: str, labels: Mapping[str, str]
) -> None:
    """Set some of a blob's labels; writes nothing if they are set already.

    Raises:
        NotFound: the namespace has no such blob.
    """
    present = (await content.info(namespace, digest)).labels
    missing = {key: value for key, value in labels.items() if present.get(key) != value}
    if missing:
        await content.update(namespace, digest, missing, [f"labels.{key}" for key in missing])
