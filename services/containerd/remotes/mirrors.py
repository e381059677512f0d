"""Registries whose images may lie at several hosts: the mirrors of hosts.toml, then the own one.

The hosts are asked in order. One that does not have what is wanted, refuses it, or sends wrong
bytes is passed over; one that cannot be reached is not asked again in this transfer as long as
another one can be. What a transfer ends with is the word of the last host, the registry itself. A
push goes to the first host that takes pushes, and nowhere else: an image must not end up in halves.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import structlog

from services.common.errors import DataLoss, FailedPrecondition, TheseusError, Unavailable
from services.containerd.remotes.api import RepositoryApi
from services.containerd.remotes.auth import Authorizer
from services.containerd.remotes.distribution import Repository
from services.containerd.remotes.endpoint import Capability, own_endpoint
from services.containerd.remotes.hosts import find_endpoints
from services.containerd.remotes.http import HttpClient, HttpLimits, Transport
from services.containerd.remotes.retry import RetryPolicy

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
    from pathlib import Path
    from types import TracebackType
    from typing import Self

    from services.containerd.content.descriptor import Descriptor
    from services.containerd.content.store import ContentWriter
    from services.containerd.images.reference import Reference
    from services.containerd.remotes.endpoint import Endpoint
    from services.containerd.remotes.remote import RegistryAccess

log = structlog.get_logger(__name__)

_MIRROR_ATTEMPTS = 2

T = TypeVar("T")


class DistributionRegistries:
    """Implements :class:`Registries`; use it as an async context manager.

    Args:
        hosts: directories with a directory for each registry; see :mod:`.hosts`.
        limits: of single requests.
        policy: of retries.
        user_agent: who we say we are.
    """

    def __init__(
        self,
        *,
        hosts: Sequence[Path] = (),
        limits: HttpLimits | None = None,
        policy: RetryPolicy | None = None,
        user_agent: str = "theseus",
    ) -> None:
        self._hosts = tuple(hosts)
        self._http = HttpClient(limits or HttpLimits(), user_agent=user_agent)
        self._policy = policy or RetryPolicy()

    async def __aenter__(self) -> Self:
        await self._http.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._http.__aexit__(kind, error, traceback)

    def open(self, reference: Reference, access: RegistryAccess) -> MirroredRepository:
        """See :class:`Registries`."""
        own_endpoint(reference.domain, access.default_scheme)  # refused at once if it is nonsense
        return MirroredRepository(reference, lambda: self._sites(reference, access))

    async def _sites(self, reference: Reference, access: RegistryAccess) -> list[_Site]:
        hosts = access.hosts or self._hosts

        def load() -> list[tuple[Endpoint, Transport]]:
            found = find_endpoints(hosts, reference.domain, access.default_scheme)
            return [(each, Transport(each.tls.context(), each.connect_timeout_s)) for each in found]

        *mirrors, own = await asyncio.to_thread(load)
        hasty = replace(self._policy, attempts=min(self._policy.attempts, _MIRROR_ATTEMPTS))
        policies = [*((mirror, hasty) for mirror in mirrors), (own, self._policy)]
        sites = []
        for (endpoint, transport), policy in policies:
            authorizer = Authorizer(self._http, access, transport)
            api = RepositoryApi(
                self._http, authorizer, reference, access, endpoint=endpoint, transport=transport
            )
            sites.append(_Site(endpoint, Repository(api, policy=policy)))
        return sites


@dataclass(slots=True)
class _Site:
    endpoint: Endpoint
    repository: Repository
    is_down: bool = False


class MirroredRepository:
    """Implements :class:`Remote`."""

    def __init__(self, reference: Reference, load: Callable[[], Awaitable[list[_Site]]]) -> None:
        self._reference = reference
        self._load = load
        self._loaded: list[_Site] | None = None
        self._loading = asyncio.Lock()

    @property
    def reference(self) -> Reference:
        """See :class:`Remote`."""
        return self._reference

    async def resolve(self) -> Descriptor:
        """See :class:`Remote`."""
        # What a digest stands for no mirror can be behind with.
        needed = Capability.PULL if self._reference.digest else Capability.RESOLVE
        return await self._first(needed, lambda repository, _: repository.resolve())

    async def fetch(self, descriptor: Descriptor, writer: ContentWriter) -> None:
        """See :class:`Remote`."""

        async def fetch(repository: Repository, is_last: bool) -> None:
            try:
                await repository.fetch(descriptor, writer)
            except DataLoss:
                if not is_last:
                    await writer.truncate()
                raise
            if not is_last and writer.digest != descriptor.digest:
                await writer.truncate()
                raise DataLoss(f"wrong bytes for {descriptor.digest}: they have {writer.digest}")

        await self._first(Capability.PULL, fetch)

    async def referrers(self, digest: str) -> tuple[Descriptor, ...]:
        """See :class:`Remote`."""
        return await self._first(
            Capability.REFERRERS, lambda repository, _: repository.referrers(digest)
        )

    async def has(self, descriptor: Descriptor) -> bool:
        """See :class:`Remote`."""
        return await (await self._pushed_to()).has(descriptor)

    async def push(
        self,
        descriptor: Descriptor,
        read: Callable[[int], AsyncGenerator[bytes, None]],
        *,
        mount_from: str = "",
        tag: str = "",
    ) -> None:
        """See :class:`Remote`."""
        repository = await self._pushed_to()
        await repository.push(descriptor, read, mount_from=mount_from, tag=tag)

    async def _first(
        self, needed: Capability, work: Callable[[Repository, bool], Awaitable[T]]
    ) -> T:
        """What the first host gives that can; or the error of the last one."""
        sites = await self._sites(needed)
        errors: dict[str, TheseusError] = {}
        order = sorted(sites, key=lambda site: site.is_down)
        for site in order:
            host = site.endpoint.root.authority
            try:
                return await work(site.repository, site is order[-1])
            except TheseusError as error:
                errors[host] = error
                site.is_down = isinstance(error, Unavailable)
                if site is not order[-1]:
                    log.warning("host is passed over", host=host, error=error.message)
        raise errors[sites[-1].endpoint.root.authority]

    async def _pushed_to(self) -> Repository:
        return (await self._sites(Capability.PUSH))[0].repository

    async def _sites(self, needed: Capability) -> list[_Site]:
        async with self._loading:
            if self._loaded is None:
                self._loaded = await self._load()
        able = [site for site in self._loaded if needed in site.endpoint.capabilities]
        if not able:
            hosts = ", ".join(site.endpoint.root.authority for site in self._loaded)
            raise FailedPrecondition(
                f"no host of {self._reference.domain} has the capability {str(needed)!r}: its "
                f"hosts.toml names {hosts}"
            )
        return able
