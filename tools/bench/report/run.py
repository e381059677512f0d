"""A run as a whole, as it is kept in JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from tools.bench.figures import Figures
from tools.bench.host import Host

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class Absence:
    """Somebody who could not be measured, what at, and why."""

    subject: str
    what: str
    reason: str


@dataclass(frozen=True, slots=True)
class Run:
    """Everything that a report is made of.

    Attributes:
        quick: whether numbers and sizes were cut down.
        seconds: how long it all took.
    """

    host: Host
    quick: bool
    seconds: float
    figures: Figures
    absences: tuple[Absence, ...]

    def write(self, path: Path) -> None:
        """Write it as JSON."""
        value = {
            "host": asdict(self.host),
            "quick": self.quick,
            "seconds": round(self.seconds, 1),
            "absences": [asdict(absence) for absence in self.absences],
            "figures": self.figures.to_json(),
        }
        path.write_text(json.dumps(value, indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> Run:
        """What :meth:`write` wrote."""
        value = json.loads(path.read_text())
        return cls(
            host=Host(**value["host"]),
            quick=value["quick"],
            seconds=value["seconds"],
            figures=Figures.from_json(value["figures"]),
            absences=tuple(Absence(**absence) for absence in value["absences"]),
        )
