"""At which place of which log file the bytes of a stream lie; see ``log_reader.py``."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import astuple, dataclass, field
from typing import TYPE_CHECKING, Any, Self

from services.common.frozen import frozen

if TYPE_CHECKING:
    from collections.abc import Mapping

INDEX_DISTANCE_BYTES = 256 << 10
PLACES_MAX = 4096


@frozen
class Place:
    """Where a stretch of a stream begins in the log.

    Attributes:
        offset: of its first byte in the stream.
        generation: number of the file, counted from the first.
        position: in that file; the line there, or one after it, is the stream's.
        lossy: the stretch cannot be read back: dropped, or not UTF-8.
    """

    offset: int
    generation: int
    position: int
    lossy: bool


@dataclass(slots=True)
class StreamIndex:
    """Places of one stream in order, and how much of it is in the file."""

    written: int = 0
    places: list[Place] = field(default_factory=list)
    distance: int = INDEX_DISTANCE_BYTES

    def add(self, place: Place) -> None:
        """Note a place, unless the last one is near and of the same kind."""
        last = self.places[-1] if self.places else None
        if (
            last is None
            or last.generation != place.generation
            or last.lossy != place.lossy
            or place.offset - last.offset >= self.distance
        ):
            self.places.append(place)
            if len(self.places) > PLACES_MAX:
                self._thin()

    def find(self, offset: int) -> tuple[Place | None, int]:
        """The last place at or before ``offset``, and the offset where its stretch ends."""
        number = bisect_right(self.places, offset, key=lambda place: place.offset)
        end = self.places[number].offset if number < len(self.places) else self.written
        return (self.places[number - 1] if number else None), end

    def pack(self) -> dict[str, Any]:
        """The index as plain data, for :meth:`unpack`."""
        places = [astuple(place) for place in self.places]
        return {"written": self.written, "distance": self.distance, "places": places}

    @classmethod
    def unpack(cls, saved: Mapping[str, Any]) -> Self:
        """The index that was packed."""
        places = [Place(*place) for place in saved["places"]]
        return cls(saved["written"], places, saved["distance"])

    def _thin(self) -> None:
        """Forget every second place that is of the same kind as the one before it."""
        self.distance *= 2
        kept = [self.places[0]]
        skipped = False
        for place in self.places[1:]:
            last = kept[-1]
            alike = (last.generation, last.lossy) == (place.generation, place.lossy)
            if alike and not skipped:
                skipped = True
                continue
            skipped = False
            kept.append(place)
        self.places = kept
