"""The engines that are compared, each behind one interface (:mod:`.engine`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tools.bench.engines.containerd import DebianContainerd, TheseusContainerd
from tools.bench.engines.dockerd import Dockerd
from tools.bench.engines.packed import PackedDebian, PackedTheseus
from tools.bench.engines.podman import Podman
from tools.bench.engines.theseus import Theseus

if TYPE_CHECKING:
    from tools.bench.engines.engine import Engine

CONTAINERDS: tuple[type[Engine], ...] = (TheseusContainerd, DebianContainerd)
PACKED: tuple[type[Engine], ...] = (PackedTheseus, PackedDebian)
DAEMONS: tuple[type[Engine], ...] = (Theseus, Dockerd, Podman)
