"""What a check finds."""

from __future__ import annotations

from enum import Enum, StrEnum

from services.common.frozen import frozen


class Severity(StrEnum):
    """How bad it is."""

    DAMAGE = "damage"
    """Something that is recorded is not there, or is not what it was."""

    LEFTOVER = "leftover"
    """Something takes room and is of no use: a crash leaves it, and the next start removes it."""


class Kind(Enum):
    """What it is about."""

    DATABASE = "database"
    BLOB = "blob"
    INGEST = "ingest"
    COMMITTED = "snapshot"
    ACTIVE = "active snapshot"
    DIRECTORY = "directory"


@frozen
class Finding:
    """One thing that is not as it should be.

    Attributes:
        severity: how bad it is.
        kind: what it is about.
        name: of that: a digest, or ``<snapshotter>/<namespace>/<key>``.
        text: what is wrong with it.
        remedy: what was done about it, or why nothing could be; empty: nothing was tried.
        repaired: whether it is as it should be now.
    """

    severity: Severity
    kind: Kind
    name: str
    text: str
    remedy: str = ""
    repaired: bool = False

    def __str__(self) -> str:
        remedy = f" ({self.remedy})" if self.remedy else ""
        return f"{self.severity}: {self.kind.value} {self.name}: {self.text}{remedy}"

    @property
    def remains(self) -> bool:
        """Whether it is damage that is still there."""
        return self.severity == Severity.DAMAGE and not self.repaired
