"""What an image store is: names, each pointing to the blob that is an image.

A name is whatever the client made of a reference (``docker.io/library/busybox:latest``); the store
does not parse it. The target is a descriptor of an index or a manifest, which need not be there.
"""

from __future__ import annotations

from dataclasses import field
from typing import TYPE_CHECKING, Protocol

from services.common.frozen import frozen

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from services.containerd.content.descriptor import Descriptor


@frozen
class Image:
    """What is recorded of an image. Times are 0 until it is."""

    name: str
    target: Descriptor
    labels: Mapping[str, str] = field(default_factory=dict)
    created_at_ns: int = 0
    updated_at_ns: int = 0


class ImageStore(Protocol):
    """Keeps images. Every method is safe to call concurrently."""

    async def get(self, namespace: str, name: str) -> Image:
        """The image of that name.

        Raises:
            NotFound: there is none.
        """

    async def find(self, namespace: str, filters: Sequence[str] = ()) -> list[Image]:
        """Images that match any of the filters, by name; all if there are none.

        Raises:
            InvalidArgument: a filter does not parse.
        """

    async def create(self, namespace: str, image: Image) -> Image:
        """Record a new image; returns it with its times.

        Raises:
            AlreadyExists: the name is taken.
            InvalidArgument: no name, no target digest or media type, or a malformed label.
        """

    async def update(self, namespace: str, image: Image, fields: Sequence[str] = ()) -> Image:
        """Change what is recorded of an image.

        Args:
            namespace: where it is.
            image: the new values.
            fields: field mask paths: ``target``, ``labels``, ``annotations``, or one entry of the
                latter two (``labels.<name>``), which an empty value removes. Empty replaces all.

        Raises:
            NotFound: there is none of that name.
            InvalidArgument: a path names something else, or a value is malformed.
        """

    async def put(self, namespace: str, image: Image) -> Image:
        """Record an image in one step, whether its name is taken or not.

        The target is replaced; labels are added to those that the name has already.
        """

    async def delete(
        self, namespace: str, name: str, *, target_digest: str = "", sync: bool = False
    ) -> None:
        """Forget an image; what it alone kept is garbage now.

        Args:
            namespace: where it is.
            name: which.
            target_digest: only if its target is this one; empty: whatever it is.
            sync: return when the garbage has been collected.

        Raises:
            NotFound: there is none of that name, or it has another target.
        """
