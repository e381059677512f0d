"""Reads a stream's bytes back out of the log, by their offset.

The writer's index says near which line a byte lies; from there lines are parsed and counted. What
was rotated away, dropped, or not UTF-8 (a JSON string cannot hold it) is a gap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path
    from typing import BinaryIO

    from services.shim.stdio.formats import Format
    from services.shim.stdio.log_index import Place
    from services.shim.stdio.log_writer import LogWriter


def read(writer: LogWriter, stream: str, offset: int, limit: int) -> tuple[bytes, int]:
    """Bytes of a stream from ``offset`` on. Blocks.

    Args:
        writer: owner of the files; its thread may go on writing.
        stream: stdout or stderr.
        offset: below what the index says is written.
        limit: most bytes wanted.

    Returns:
        Bytes, at least one; or none, and the offset from which there are bytes again.
    """
    with writer.file_lock:
        index = writer.index[stream]
        place, end = index.find(offset)
        if place is None or place.lossy:
            following = index.places[0].offset if place is None and index.places else end
            return b"", max(following, offset + 1)
        try:
            file = _path(writer, place).open("rb")
        except OSError:
            return b"", end
    with file:
        data = _scan(file, writer.format, place, stream, range(offset, min(end, offset + limit)))
    return (data, 0) if data else (b"", end)


def _path(writer: LogWriter, place: Place) -> Path:
    age = writer.generation - place.generation
    return writer.path if age == 0 else writer.path.with_name(f"{writer.path.name}.{age}")


def _scan(file: BinaryIO, form: Format, place: Place, stream: str, wanted: range) -> bytes:
    file.seek(place.position)
    at = place.offset
    found = bytearray()
    for line in file:
        parsed = form.parse(line)
        if parsed is None:
            break
        if parsed[0] != stream:
            continue
        if at + len(parsed[1]) > wanted.start:
            found += parsed[1][max(0, wanted.start - at) :]
        at += len(parsed[1])
        if at >= wanted.stop:
            break
    return bytes(found[: len(wanted)])
