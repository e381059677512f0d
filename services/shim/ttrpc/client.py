"""A ttrpc client: one connection to a Unix socket, one unary call at a time."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Self

from google.protobuf.message import DecodeError

from protos.containerd.ttrpc import request_pb2
from services.shim.ttrpc.frames import REQUEST, RESPONSE, Frame, MessageTooLarge, read_frame

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType


class CallFailed(Exception):
    """The peer answered with a status that is not OK."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class TtrpcClient:
    """A connection, made by :meth:`connect`; an async context manager that closes it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._stream_id = -1
        self._lock = asyncio.Lock()

    @classmethod
    async def connect(cls, path: Path) -> TtrpcClient:
        """Connect.

        Raises:
            OSError: nobody listens there.
        """
        return cls(*await asyncio.open_unix_connection(path))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._writer.close()

    async def call(self, service: str, method: str, payload: bytes, *, timeout_s: float) -> bytes:
        """Make a call; returns its serialized response.

        Raises:
            CallFailed: the peer refused.
            ConnectionError: it is gone, or speaks something else.
            TimeoutError: it did not answer in time; the connection is of no more use.
        """
        request = request_pb2.Request(
            service=service,
            method=method,
            payload=payload,
            timeout_nano=int(timeout_s * 1e9),
        )
        async with self._lock, asyncio.timeout(timeout_s):
            self._stream_id += 2
            self._writer.write(Frame(self._stream_id, REQUEST, request.SerializeToString()).pack())
            await self._writer.drain()
            response = await self._response()
        if response.status.code:
            raise CallFailed(response.status.code, response.status.message)
        return response.payload

    async def _response(self) -> request_pb2.Response:
        while True:
            try:
                frame = await read_frame(self._reader)
            except MessageTooLarge as error:
                raise ConnectionError(str(error)) from error
            if frame is None:
                raise ConnectionError("the peer hung up")
            if frame.kind == RESPONSE and frame.stream_id == self._stream_id:
                break
        try:
            return request_pb2.Response.FromString(frame.payload)
        except DecodeError as error:
            raise ConnectionError("the peer's response cannot be decoded") from error
