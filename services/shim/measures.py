"""What a shim's containers count and time, as they see it; see ``metrics.py`` for who shows it."""

from __future__ import annotations

from typing import Protocol


class Observer(Protocol):
    """Takes the lengths of something."""

    def observe(self, amount: float, /) -> object:
        """Take one, in seconds."""
        ...


class Measures(Protocol):
    """Measures of all containers of a shim."""

    @property
    def create_seconds(self) -> Observer:
        """Time to create a container."""
        ...

    @property
    def start_seconds(self) -> Observer:
        """Time to start a container."""
        ...

    @property
    def exec_seconds(self) -> Observer:
        """Time to start an exec process."""
        ...

    def read(self, stream: str, count: int) -> None:
        """Count bytes of output that were read."""
        ...

    def newlines(self, stream: str, count: int) -> None:
        """Count newlines in the output that was read."""
        ...

    def dropped(self, stream: str, count: int) -> None:
        """Count bytes of output that are lost."""
        ...


class Unmeasured:
    """Measures that nobody asks for: under a stock containerd there is no one to scrape a shim."""

    def __init__(self) -> None:
        self.create_seconds = self.start_seconds = self.exec_seconds = self

    def observe(self, amount: float, /) -> None:
        """Forget it."""

    def read(self, stream: str, count: int) -> None:
        """Forget it."""

    def newlines(self, stream: str, count: int) -> None:
        """Forget it."""

    def dropped(self, stream: str, count: int) -> None:
        """Forget it."""
