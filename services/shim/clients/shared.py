"""One channel to containerd for all members of a shim: each costs more memory than what it carries.

It is shared by those that connect while it is good. The first that lets go of it takes it out of
use, since that is what happens when it broke; it is closed when the last has let go.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class SharedChannel:
    """Makes channels; see the module.

    Args:
        make: connects to a socket.
    """

    def __init__(self, make: Callable[[Path], Any]) -> None:
        self._make = make
        self._good: _Counted | None = None

    def __call__(self, path: Path) -> Use:
        """A use of the channel, or of a new one; the caller closes it."""
        if self._good is None:
            self._good = _Counted(self._make(path))
        self._good.users += 1
        return Use(self, self._good)

    async def let_go(self, counted: _Counted) -> None:
        """One use less."""
        if self._good is counted:
            self._good = None
        counted.users -= 1
        if not counted.users:
            await counted.channel.close()


class _Counted:
    def __init__(self, channel: Any) -> None:
        self.channel = channel
        self.users = 0


class Use:
    """A channel as its one user sees it."""

    def __init__(self, shared: SharedChannel, counted: _Counted) -> None:
        self._shared = shared
        self._counted: _Counted | None = counted
        self.stream_stream = counted.channel.stream_stream

    async def close(self) -> None:
        """Use it no more. Idempotent."""
        counted, self._counted = self._counted, None
        if counted is not None:
            await self._shared.let_go(counted)
