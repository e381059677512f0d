"""What images need from containerd: its interfaces, and the data that goes over them."""

from __future__ import annotations

from dataclasses import field
from typing import TYPE_CHECKING, Protocol

from services.common.frozen import frozen

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping


@frozen
class Descriptor:
    """What an image's name points to."""

    media_type: str
    digest: str
    size_bytes: int


@frozen
class NamedImage:
    """One name in containerd's image store."""

    name: str
    target: Descriptor
    updated_at_ns: int = 0
    labels: Mapping[str, str] = field(default_factory=dict)


@frozen
class TransferProgress:
    """One report of a transfer, in containerd's words (``downloading``, ``extracting``, ...).

    Attributes:
        name: of the object; empty for the transfer as a whole.
        digest: of the blob; empty when the report is about no blob.
        media_type: of that blob.
        total_bytes: 0 when not known.
    """

    event: str
    name: str = ""
    digest: str = ""
    media_type: str = ""
    current_bytes: int = 0
    total_bytes: int = 0


@frozen
class Platform:
    """For which machine."""

    os: str
    architecture: str
    variant: str = ""

    def __str__(self) -> str:
        parts = (self.os, self.architecture, self.variant)
        return "/".join(part for part in parts if part)


@frozen
class RegistryCredentials:
    """What a user shows to a registry: a password, or one of the tokens."""

    username: str = ""
    password: str = field(default="", repr=False)
    identity_token: str = field(default="", repr=False)
    registry_token: str = field(default="", repr=False)


class ImageNames(Protocol):
    """Names of images."""

    async def list_all(self) -> list[NamedImage]:
        """All of them."""

    async def get(self, name: str) -> NamedImage | None:
        """One, or None."""

    async def put(self, image: NamedImage) -> None:
        """Record a name, or have it point somewhere else."""

    async def delete(self, name: str, *, collect: bool) -> None:
        """Forget a name; with ``collect``, return only after what it alone kept is gone.

        One that is not there is no error.
        """


class Content(Protocol):
    """Blobs."""

    async def read(self, digest: str, *, limit_bytes: int) -> bytes:
        """A whole blob.

        Raises:
            NotFound: it is not here.
            DataLoss: it is larger than ``limit_bytes``.
        """


class ImageTransfer(Protocol):
    """Ways of images into the node. Progress is reported while a transfer runs."""

    async def pull(
        self,
        reference: str,
        *,
        platform: Platform,
        snapshotter: str,
        progress: Callable[[TransferProgress], None],
        credentials: RegistryCredentials | None = None,
    ) -> None:
        """Fetch an image from its registry, unpack it, record its name.

        The credentials are shown to the registry that the reference names, and to no mirror.
        """

    async def load(
        self,
        archive: AsyncIterator[bytes],
        *,
        untagged: str,
        platform: Platform,
        snapshotter: str,
        progress: Callable[[TransferProgress], None],
    ) -> None:
        """Take in an archive, unpack and record its images.

        Args:
            archive: the pieces of the file.
            untagged: images without a name get this one, with their digest.
            platform: what to unpack.
            snapshotter: where to.
            progress: told of each image that is recorded as an event ``saved`` with its name.
        """
