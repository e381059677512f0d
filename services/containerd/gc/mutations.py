"""What stores tell of their records, for the time of the next collection."""

from __future__ import annotations

from typing import Protocol


class Mutations(Protocol):
    """Is told of every change to records, on the event loop and after its commit."""

    def changed(self) -> None:
        """Something was made, or changed: it may refer to less than before."""

    def deleted(self) -> None:
        """A reference was removed: what only that one kept is garbage now."""


class Unheard:
    """Where nobody collects: programs that look a root through, and tests."""

    def changed(self) -> None:
        """See the interface."""

    def deleted(self) -> None:
        """See the interface."""


UNHEARD = Unheard()
