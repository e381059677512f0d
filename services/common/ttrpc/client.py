"""A ttrpc client: one connection to a Unix socket, any number of unary calls at the same time."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Self

from google.protobuf.message import DecodeError

from protos.containerd.ttrpc import request_pb2
from services.common.background import Background
from services.common.ttrpc.frames import REQUEST, RESPONSE, Frame, MessageTooLarge, read_frame

if TYPE_CHECKING:
    from collections.abc import Mapping
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
        self._answers: dict[int, asyncio.Future[request_pb2.Response]] = {}
        self._broken: ConnectionError | None = None
        self._reading = Background()
        self._reading.start(self._read(), name="ttrpc answers")

    @classmethod
    async def connect(cls, path: Path) -> TtrpcClient:
        """Connect.

        Raises:
            OSError: nobody listens there.
        """
        return cls(*await asyncio.open_unix_connection(path))

    @property
    def broken(self) -> bool:
        """Whether the connection is of no more use."""
        return self._broken is not None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; calls under way end with ConnectionError. Idempotent."""
        await self._reading.stop()
        self._break(ConnectionError("the connection was closed"))

    async def call(
        self,
        service: str,
        method: str,
        payload: bytes,
        *,
        timeout_s: float,
        metadata: Mapping[str, str] | None = None,
    ) -> bytes:
        """Make a call; returns its serialized response.

        Raises:
            CallFailed: the peer refused.
            ConnectionError: it is gone, or speaks something else.
            TimeoutError: it did not answer in time.
        """
        request = request_pb2.Request(
            service=service,
            method=method,
            payload=payload,
            timeout_nano=int(timeout_s * 1e9),
            metadata=[
                request_pb2.KeyValue(key=key, value=value)
                for key, value in (metadata or {}).items()
            ],
        )
        if self._broken is not None:
            raise self._broken
        # From here to the write nothing is awaited: stream ids grow in the order of the frames.
        self._stream_id += 2
        stream_id = self._stream_id
        packed = Frame(stream_id, REQUEST, request.SerializeToString()).pack()
        answer = self._answers[stream_id] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(timeout_s):
                self._writer.write(packed)
                await self._writer.drain()
                response: request_pb2.Response = await answer
        finally:
            del self._answers[stream_id]
            if answer.done() and not answer.cancelled():
                answer.exception()  # it may have come too late for anybody to ask
        if response.status.code:
            raise CallFailed(response.status.code, response.status.message)
        return response.payload

    async def _read(self) -> None:
        while True:
            try:
                frame = await read_frame(self._reader)
            except MessageTooLarge as error:
                self._break(ConnectionError(str(error)))
                return
            if frame is None:
                self._break(ConnectionError("the peer hung up"))
                return
            answer = self._answers.get(frame.stream_id)
            if frame.kind != RESPONSE or answer is None or answer.done():
                continue  # nobody waits for it any more
            try:
                answer.set_result(request_pb2.Response.FromString(frame.payload))
            except DecodeError:
                self._break(ConnectionError("the peer's response cannot be decoded"))
                return

    def _break(self, reason: ConnectionError) -> None:
        self._broken = self._broken or reason
        self._writer.close()
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(reason)
