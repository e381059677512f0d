"""Where a container is at home: what it reports to, and the state file that tells of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog

if TYPE_CHECKING:
    from collections.abc import Iterable

    from services.shim.bundle import Bundle
    from services.shim.container import Container
    from services.shim.surroundings import Surroundings

log = structlog.get_logger(__name__)

STATE_FILE = "state.json"


class Home:
    """The home of one or more containers.

    Args:
        bundle: has the state file.
        around: what its containers share.
    """

    def __init__(self, bundle: Bundle, around: Surroundings) -> None:
        self.bundle = bundle
        self.around = around
        self.epoch = int(bundle.read(STATE_FILE).get("epoch", 0))

    def save(self, containers: Iterable[Container]) -> None:
        """Write the state file, which tells of these containers."""
        state = {
            "epoch": self.epoch,
            "containers": [container.state() for container in containers],
        }
        try:
            self.bundle.write(STATE_FILE, state)
        except OSError as error:
            log.warning("state file cannot be written", error=error.strerror)
