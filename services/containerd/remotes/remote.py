"""What a remote is: one repository of a registry, seen by those who move images."""

from __future__ import annotations

from dataclasses import field
from typing import TYPE_CHECKING, Protocol

from services.common.frozen import frozen

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
    from pathlib import Path

    from services.containerd.content.descriptor import Descriptor
    from services.containerd.content.store import ContentWriter
    from services.containerd.images.reference import Reference


@frozen
class Credentials:
    """What somebody shows to a registry. Nothing set: anonymous.

    Attributes:
        username: with ``secret``, traded for a token or sent as they are.
        secret: the password.
        refresh_token: traded for a token.
        header: the whole value of the Authorization header.
    """

    username: str = ""
    secret: str = field(default="", repr=False)
    refresh_token: str = field(default="", repr=False)
    header: str = field(default="", repr=False)


@frozen
class RegistryAccess:
    """How a registry is spoken to.

    Attributes:
        credentials: asked with the registry's host when that wants to know; None: anonymous.
        headers: added to every request.
        default_scheme: ``http`` or ``https``; empty: http for loopback hosts, https for others.
        hosts: directories to look for hosts.toml in; empty: those that are configured.
    """

    credentials: Callable[[str], Awaitable[Credentials]] | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    default_scheme: str = ""
    hosts: tuple[Path, ...] = ()


class Remote(Protocol):
    """One repository. Every method is safe to call concurrently, and limits its own time.

    Every method raises:
        NotFound: the registry does not have it, or does not want to say so.
        Unauthenticated: it wants credentials, or does not like those that it got.
        PermissionDenied: it knows who asks, and refuses.
        Unavailable: it cannot be reached, or is busy, after all attempts; ``retry_after_s`` is what
            it asked for.
        FailedPrecondition: what answers is not a registry.
    """

    @property
    def reference(self) -> Reference:
        """The name that the remote was opened with."""

    async def resolve(self) -> Descriptor:
        """What the reference's digest or tag stands for now.

        Raises:
            MalformedManifest: it is something else than an index or a manifest, or of schema 1.
            ResourceExhausted: it is too large.
        """

    async def fetch(self, descriptor: Descriptor, writer: ContentWriter) -> None:
        """Write a blob to ``writer``, from its offset on; the caller commits.

        A connection that is cut is taken up where it ended.

        Raises:
            DataLoss: the registry sent more bytes than the descriptor says.
        """

    async def referrers(self, digest: str) -> tuple[Descriptor, ...]:
        """What refers to a manifest or an index, with ``artifact_type``; none if it is not there.

        Raises:
            MalformedManifest: the registry's list does not parse.
        """

    async def has(self, descriptor: Descriptor) -> bool:
        """Whether the repository has a blob, an index or a manifest already."""

    async def push(
        self,
        descriptor: Descriptor,
        read: Callable[[int], AsyncGenerator[bytes, None]],
        *,
        mount_from: str = "",
        tag: str = "",
    ) -> None:
        """Upload a blob, an index or a manifest.

        Args:
            descriptor: what it is.
            read: gives its bytes from an offset on; called again for each attempt.
            mount_from: a repository of the same registry that may have the blob already.
            tag: for an index or a manifest, the tag to give to it; empty: none.
        """


class Registries(Protocol):
    """Opens remotes."""

    def open(self, reference: Reference, access: RegistryAccess) -> Remote:
        """The repository that ``reference`` names; nothing is sent yet.

        Raises:
            InvalidArgument: the reference has no domain.
        """
