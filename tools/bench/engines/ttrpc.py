"""One call of ttrpc, which Debian's shims speak (containerd/ttrpc, PROTOCOL.md)."""

from __future__ import annotations

import socket
import struct
from typing import TYPE_CHECKING

from tools.bench.engines.engine import CALL_S, BenchError

if TYPE_CHECKING:
    from google.protobuf.message import Message

_HEADER = struct.Struct(">IIBB")
"""Length of what follows, stream, type, flags."""

_REQUEST, _RESPONSE = 1, 2
_STREAM = 1
_BYTES = 2
"""Wire type of strings, bytes and messages in protobuf."""


def call(address: str, service: str, method: str, request: Message) -> None:
    """Ask, and wait for an answer.

    Raises:
        BenchError: it says that the call failed, or is none.
    """
    message = b"".join(
        _field(number, value)
        for number, value in enumerate(
            (service.encode(), method.encode(), request.SerializeToString()), start=1
        )
    )
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(CALL_S)
        connection.connect(address)
        connection.sendall(_HEADER.pack(len(message), _STREAM, _REQUEST, 0) + message)
        length, stream, kind, _ = _HEADER.unpack(_read(connection, _HEADER.size))
        answer = _read(connection, length)
    if (stream, kind) != (_STREAM, _RESPONSE):
        raise BenchError(f"{method}: a message of type {kind} on stream {stream} is no answer")
    if answer[:1] == _tag(1):  # Response.status is only there when the call failed
        raise BenchError(f"{method}: {answer!r}")


def _read(connection: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        piece = connection.recv(length - len(data))
        if not piece:
            raise BenchError("the connection was closed before the answer was there")
        data += piece
    return data


def _field(number: int, value: bytes) -> bytes:
    if len(value) > 127:
        raise ValueError("a length of more than one byte is not needed here")
    return _tag(number) + bytes([len(value)]) + value


def _tag(number: int) -> bytes:
    return bytes([number << 3 | _BYTES])
