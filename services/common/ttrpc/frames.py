"""ttrpc's frames: ten bytes of header, then a message.

    length of the message   32 bits, big-endian
    number of the stream    32 bits, big-endian; a client's are odd, and grow
    kind                    8 bits: request, response, data
    flags                   8 bits, for streams: see below

A unary call is one request and one response. A call that streams has data frames in between, in
either direction. A message of more than 4 MiB is refused, its bytes skipped; the connection goes
on.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from services.common.frozen import frozen

if TYPE_CHECKING:
    from collections.abc import Iterator

MESSAGE_MAX_BYTES = 4 << 20

REQUEST, RESPONSE, DATA = 1, 2, 3
CANCEL = 0x80
"""Ours: the client gives the call up. Others pass over kinds that they do not know."""

REMOTE_CLOSED = 0x1
"""The sender sends no more on this stream."""
REMOTE_OPEN = 0x2
"""The sender is going to send more on this stream."""
NO_DATA = 0x4
"""The frame carries no message, as opposed to an empty one."""

_HEADER = struct.Struct(">IIBB")


@frozen
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


class FrameBuffer:
    """Makes frames of a connection's bytes, however they arrive.

    Attributes:
        alien: these bytes are no frames; gRPC's first are recognised by their kind, zero.
    """

    def __init__(self) -> None:
        self.alien = False
        self._rest = b""
        self._skip_bytes = 0

    def feed(self, data: bytes) -> Iterator[Frame | MessageTooLarge]:
        """Take bytes in; gives the frames that they complete, and what was skipped."""
        data = self._rest + data if self._rest else data
        position = 0
        while True:
            if self._skip_bytes:
                skipped = min(self._skip_bytes, len(data) - position)
                self._skip_bytes -= skipped
                position += skipped
            begin = position + _HEADER.size
            if begin > len(data):
                break
            length, stream_id, kind, flags = _HEADER.unpack_from(data, position)
            if kind == 0:
                self.alien = True
                return
            if length > MESSAGE_MAX_BYTES:
                position, self._skip_bytes = begin, length
                yield MessageTooLarge(stream_id, length)
                continue
            if begin + length > len(data):
                break
            position = begin + length
            yield Frame(stream_id, kind, data[begin:position], flags)
        self._rest = data[position:]
