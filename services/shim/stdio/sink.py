"""Where output goes: the interface between those who read pipes and those who keep the bytes.

A sink never blocks and never refuses: it takes what it is given, and says by ``ready`` whether it
wants more. Who feeds it stops reading the pipe while it is not ready, so that the container waits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from services.shim.handover import Outgoing

STDOUT = "stdout"
STDERR = "stderr"


class Sink(Protocol):
    """Takes the output of one process; its methods are called in the event loop's thread."""

    @property
    def ready(self) -> bool:
        """Whether it wants more."""
        ...

    def when_ready(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` once, as soon as it is ready again."""
        ...

    def write(self, stream: str, data: bytes) -> None:
        """Take ``data`` of a stream, STDOUT or STDERR."""
        ...

    def finish(self, stream: str) -> None:
        """Note that a stream has ended."""
        ...

    async def settle(self) -> None:
        """Wait until what was taken is where it belongs, or cannot get there for now."""
        ...

    def pack(self, out: Outgoing) -> dict[str, Any]:
        """What the next image of the shim goes on with (see ``handover.py``); once settled.

        Raises:
            FailedPrecondition: something is on the way that cannot be packed.
        """
        ...

    async def close(self) -> None:
        """Release what it holds; called once, after the last ``finish`` or instead of it."""
        ...
