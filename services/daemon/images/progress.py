"""What a pull has done so far, out of containerd's reports."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from services.daemon.images.image import LayerProgress

if TYPE_CHECKING:
    from services.daemon.images.node import TransferProgress

_STATUS = {
    "waiting": "waiting",
    "downloading": "fetching",
    "complete": "fetched",
    "extracting": "unpacking",
    "extracted": "done",
    "already exists": "exists",
}
_RANK = {"waiting": 0, "fetching": 1, "fetched": 2, "exists": 2, "unpacking": 3, "done": 4}


class PullProgress:
    """Collects reports by layer; a layer never goes back."""

    def __init__(self) -> None:
        self.layers: dict[str, LayerProgress] = {}
        self._changed = asyncio.Event()

    def update(self, report: TransferProgress) -> None:
        """Take one report in."""
        status = _STATUS.get(report.event)
        if status is None or not report.digest or "layer" not in _kind(report):
            return
        present = self.layers.get(report.digest)
        if present is not None and _RANK[status] < _RANK[present.status]:
            return
        self.layers[report.digest] = LayerProgress(
            report.digest, status, report.current_bytes, report.total_bytes
        )
        self._changed.set()

    async def changed(self) -> None:
        """Wait until there is something new since the last :meth:`report`."""
        await self._changed.wait()

    def report(self) -> list[LayerProgress]:
        """The state of every layer, in the order in which they were first heard of."""
        self._changed.clear()
        return list(self.layers.values())

    def finished(self) -> list[LayerProgress]:
        """The last report: what was fetched has been unpacked as well."""
        return [
            LayerProgress(
                layer.name,
                layer.status if layer.status == "exists" else "done",
                layer.total_bytes,
                layer.total_bytes,
            )
            for layer in self.layers.values()
        ]


def _kind(report: TransferProgress) -> str:
    return report.media_type or report.name
