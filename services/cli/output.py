"""Output of a process on our own standard streams: each byte once, however often it is sent."""

from __future__ import annotations

import asyncio
import os

from protos.theseus.engine.v1 import containers_pb2 as pb
from services.cli.failure import warn

_DESCRIPTORS = {pb.STREAM_KIND_STDOUT: 1, pb.STREAM_KIND_STDERR: 2}


class OutputWriter:
    """Writes what comes; ``offset`` is the first byte that was not written yet."""

    def __init__(self, offset: int = 0) -> None:
        self.offset = offset

    async def write(self, output: pb.AttachOutput) -> None:
        """Write what of ``output`` is new."""
        data = output.data[max(self.offset - output.offset, 0) :]
        if data:
            # In a thread: whoever reads our output may be slow, and signals must get through.
            await asyncio.to_thread(_write_all, _DESCRIPTORS.get(output.stream, 1), data)
            self.offset = output.offset + len(output.data)

    def skip(self, gap: pb.AttachGap) -> None:
        """Go on behind what cannot be had any more."""
        lost = gap.to - max(getattr(gap, "from"), self.offset)
        warn(f"{lost} bytes of output cannot be had any more")
        self.offset = gap.to


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
