"""What this package tells about itself to whoever keeps figures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from services.daemon.containers.record import ExitStatus


class Observer(Protocol):
    """Takes figures; never fails, never blocks."""

    def timed(self, action: str) -> AbstractContextManager[None]:
        """Times the block as one action: create, start, stop, ..."""

    def started(self) -> None:
        """A container was started."""

    def ended(self, status: ExitStatus) -> None:
        """A container's run has ended."""

    def journal_read(self, *, seq: int, lag_s: float) -> None:
        """Events up to ``seq`` were dealt with, the last ``lag_s`` seconds after it happened."""

    def connected(self, connected: bool) -> None:
        """containerd's journal is followed, or not any more."""

    def attach_resumed(self) -> None:
        """An attached session went on after containerd came back."""
