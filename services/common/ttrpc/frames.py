"""ttrpc's frames: ten bytes of header, then a message.

    length of the message   32 bits, big-endian
    number of the stream    32 bits, big-endian; a client's are odd, and grow
    kind                    8 bits: request, response, data
    flags                   8 bits, for streams: see below

A unary call is one request and one response. A message of more than 4 MiB is refused, its bytes
skipped; the connection goes on.
"""

from __future__ import annotations

import asyncio
import struct
from dataclasses import dataclass

MESSAGE_MAX_BYTES = 4 << 20

REQUEST, RESPONSE, DATA = 1, 2, 3

REMOTE_CLOSED = 0x1
"""The sender sends no more on this stream."""
REMOTE_OPEN = 0x2
"""The sender is going to send more on this stream."""
NO_DATA = 0x4
"""The frame carries no message, as opposed to an empty one."""

_HEADER = struct.Struct(">IIBB")
_SKIP_BYTES = 65536


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame."""

    stream_id: int
    kind: int
    payload: bytes = b""
    flags: int = 0

    def pack(self) -> bytes:
        """The frame's bytes.

        Raises:
            MessageTooLarge: no peer would take it.
        """
        if len(self.payload) > MESSAGE_MAX_BYTES:
            raise MessageTooLarge(self.stream_id, len(self.payload))
        header = _HEADER.pack(len(self.payload), self.stream_id, self.kind, self.flags)
        return header + self.payload


class MessageTooLarge(Exception):
    """A message passes the bound; its stream can be told so."""

    def __init__(self, stream_id: int, length: int) -> None:
        super().__init__(
            f"a message of {length} bytes is larger than the {MESSAGE_MAX_BYTES} that ttrpc allows"
        )
        self.stream_id = stream_id


async def read_frame(reader: asyncio.StreamReader) -> Frame | None:
    """The next frame; None when the peer is gone.

    Raises:
        MessageTooLarge: it was skipped.
    """
    try:
        length, stream_id, kind, flags = _HEADER.unpack(await reader.readexactly(_HEADER.size))
        if length > MESSAGE_MAX_BYTES:
            await _skip(reader, length)
            raise MessageTooLarge(stream_id, length)
        payload = await reader.readexactly(length) if length else b""
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    return Frame(stream_id, kind, payload, flags)


async def _skip(reader: asyncio.StreamReader, length: int) -> None:
    while length > 0:
        length -= len(await reader.readexactly(min(length, _SKIP_BYTES)))
