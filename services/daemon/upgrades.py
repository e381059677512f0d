"""Upgrades of what runs containers, under containers that go on."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from services.common.frozen import frozen

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from services.daemon.containers.manager import ContainerManager


@frozen
class UpgradedShim:
    """What became of the shim of one container; ``error`` is empty when it was upgraded."""

    container_id: str
    container_name: str = ""
    version_before: str = ""
    version: str = ""
    downtime_us: int = 0
    error: str = ""


class ShimUpgrader(Protocol):
    """Has shims execute the version of their program that is installed now."""

    def upgrade(self, container_ids: Sequence[str]) -> AsyncIterator[UpgradedShim]:
        """Upgrade the shims of containers, or of all that have one if none is named; yields each.

        Raises:
            NotFound: one of them has no shim; nothing is done.
        """
        ...


class Upgrades:
    """Upgrades by the names that users know.

    Args:
        containers: knows the names.
        shims: does it.
    """

    def __init__(self, containers: ContainerManager, shims: ShimUpgrader) -> None:
        self._containers = containers
        self._shims = shims

    async def shims(self, references: Sequence[str]) -> AsyncIterator[UpgradedShim]:
        """Upgrade the shims of containers by id or name; of all if none is named.

        Raises:
            NotFound: there is no such container, or it does not run; nothing is done.
        """
        wanted = [str(self._containers.get(reference).id) for reference in references]
        names = {str(record.id): record.name for record in self._containers.list_all(stopped=True)}
        async for done in self._shims.upgrade(wanted):
            yield replace(done, container_name=names.get(done.container_id, ""))
