"""Images as data."""

from __future__ import annotations

from typing import TYPE_CHECKING, NewType

from services.common.frozen import frozen

if TYPE_CHECKING:
    from services.daemon.spec.request import ImageConfig

ImageId = NewType("ImageId", str)


@frozen
class RunImage:
    """What a container takes from its image.

    Attributes:
        id: digest of the configuration.
        reference: full reference under which it was found; empty when found by id alone.
        chain_id: key of the snapshot of its last layer; empty for an image without layers.
    """

    id: ImageId
    reference: str
    chain_id: str
    config: ImageConfig


@frozen
class Image:
    """One image of the node.

    Attributes:
        id: digest of the configuration.
        references: full references, sorted.
        digest: of the manifest or index that the references point to.
        size_bytes: all blobs of this platform.
        created_at_ns: from the configuration; 0 when it says none.
        platform: os/architecture[/variant].
        raw_config: the configuration blob.
        chain_ids: of its layers, bottom first.
        unpacked_bytes: 0 when not unpacked.
    """

    id: ImageId
    references: tuple[str, ...]
    digest: str
    size_bytes: int
    created_at_ns: int
    platform: str
    raw_config: bytes
    config: ImageConfig
    chain_ids: tuple[str, ...]
    unpacked_bytes: int = 0


@frozen
class ImageUser:
    """A container that was made from an image; ``running`` while it has processes."""

    container_id: str
    running: bool


@frozen
class LayerProgress:
    """How far one layer, or one step, of a pull has come.

    Attributes:
        status: waiting, fetching, fetched, unpacking, done or exists.
        total_bytes: 0 when not known.
    """

    name: str
    status: str
    current_bytes: int = 0
    total_bytes: int = 0
