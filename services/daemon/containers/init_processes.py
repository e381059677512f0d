"""The OCI process of the init of containers that run, which execs in them begin from."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from services.daemon.containers.record import ContainerRecord
    from services.daemon.containers.runtime import RuntimeContainers

_KEPT_MAX = 32


class InitProcesses:
    """Those of the last few containers are kept, the others are looked up.

    Args:
        containers: containerd's records.
    """

    def __init__(self, containers: RuntimeContainers) -> None:
        self._containers = containers
        self._kept: OrderedDict[tuple[str, int], dict[str, Any]] = OrderedDict()

    def remember(self, container: ContainerRecord, process: dict[str, Any]) -> None:
        """Keep the process of the present run."""
        key = (container.id, container.runs)
        self._kept[key] = process
        self._kept.move_to_end(key)
        while len(self._kept) > _KEPT_MAX:
            self._kept.popitem(last=False)

    async def of(self, container: ContainerRecord) -> dict[str, Any]:
        """The process of the present run; raises as :meth:`RuntimeContainers.spec`."""
        process = self._kept.get((container.id, container.runs))
        if process is None:
            process = (await self._containers.spec(container.id))["process"]
        self.remember(container, process)
        return process
