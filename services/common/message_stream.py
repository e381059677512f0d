"""A call whose messages stream both ways, as bytes, whatever it travels by."""

from __future__ import annotations

from typing import Protocol


class MessageStream(Protocol):
    """One call. Every method raises what the peer failed with, and Unavailable if it is gone."""

    async def send(self, message: bytes) -> None:
        """Send a message; once the call has ended nothing happens."""

    async def end(self) -> None:
        """Send no more."""

    async def receive(self) -> bytes | None:
        """The next message; None at the call's end."""

    def close(self) -> None:
        """Give the call up if it still goes on. Idempotent."""
