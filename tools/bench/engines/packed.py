"""The two containerds with several containers to a shim.

Theseus' does so by configuration, with any containers of a namespace; Debian's shims group those
whose specification says that they belong together, as the containers of a pod do.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING

from tools.bench.engines.containerd import DebianContainerd, TheseusContainerd, theseus_containerd

if TYPE_CHECKING:
    from pathlib import Path

    from tools.bench.engines.engine import Plan
    from tools.bench.engines.server import Server
    from tools.bench.pictures import Pictures

EACH = 16
"""Containers to a shim."""


class PackedTheseus(TheseusContainerd):
    """Theseus' containerd, told to pack."""

    def _server(self, place: Path) -> Server:
        return theseus_containerd(
            place, place / "root", place / "state", "--containers-per-shim", str(EACH)
        )


class PackedDebian(DebianContainerd):
    """Debian's containerd, whose containers are of one group after the other."""

    def __init__(self, place: Path, pictures: Pictures) -> None:
        super().__init__(place, pictures)
        self._made = itertools.count()

    async def create(self, plan: Plan) -> str:
        """See Engine."""
        return await super().create(replace(plan, group=f"group-{next(self._made) // EACH}"))
