"""A ttrpc server: unary calls of several services on one Unix socket.

Calls of a connection run at the same time, each a task; when the peer hangs up they are cancelled.
What a call must finish all the same, its handler shields. Streams are part of the protocol and of
no service here: a data frame is answered with a status, as by any server whose stream has ended.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog
from google.protobuf.message import DecodeError
from google.rpc import status_pb2

from protos.containerd.ttrpc import request_pb2
from services.common.background import Background
from services.common.errors import TheseusError
from services.common.request import new_request_id, request_id
from services.common.ttrpc import status
from services.common.ttrpc.frames import (
    DATA,
    REQUEST,
    RESPONSE,
    Frame,
    MessageTooLarge,
    read_frame,
)

if TYPE_CHECKING:
    import socket
    from collections.abc import Awaitable, Callable, Mapping

    from google.protobuf.message import Message

log = structlog.get_logger(__name__)

CALLS_MAX = 1024
"""Calls that one connection may have under way."""


@dataclass(frozen=True, slots=True)
class Method:
    """A unary method: the class of its request, and what answers it."""

    request: type[Message]
    handler: Callable[[Message], Awaitable[Message]]


class TtrpcServer:
    """Serves methods by full service name and method name."""

    def __init__(self, services: Mapping[str, Mapping[str, Method]]) -> None:
        self._services = services
        self._connections = Background()
        self._server: asyncio.Server | None = None

    async def start(self, listener: socket.socket) -> None:
        """Serve a listening socket, which becomes the server's."""
        self._server = await asyncio.start_unix_server(self._accept, sock=listener)

    def stop_listening(self) -> None:
        """Take no more connections; calls go on."""
        if self._server is not None:
            self._server.close()
            self._server = None

    async def stop(self) -> None:
        """End everything."""
        self.stop_listening()
        await self._connections.stop()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = _Connection(self._services, reader, writer)
        self._connections.start(connection.run(), name="ttrpc connection")


class _Connection:
    def __init__(
        self,
        services: Mapping[str, Mapping[str, Method]],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self._services = services
        self._reader = reader
        self._writer = writer
        self._calls = Background()
        self._under_way = 0
        self._last_stream_id = 0

    async def run(self) -> None:
        try:
            while True:
                try:
                    frame = await read_frame(self._reader)
                except MessageTooLarge as error:
                    await self._refuse(error.stream_id, status.RESOURCE_EXHAUSTED, str(error))
                    continue
                if frame is None:
                    return
                await self._take(frame)
        finally:
            await self._calls.stop()
            self._writer.close()

    async def _take(self, frame: Frame) -> None:
        refuse = self._refuse
        if frame.kind not in (REQUEST, DATA):
            return  # of a later version of the protocol
        if frame.stream_id % 2 != 1:
            await refuse(frame.stream_id, status.INVALID_ARGUMENT, "a client's stream id is odd")
        elif frame.kind == DATA:
            await refuse(frame.stream_id, status.INVALID_ARGUMENT, "the stream is not active")
        elif frame.stream_id <= self._last_stream_id:
            await refuse(
                frame.stream_id, status.INVALID_ARGUMENT, "stream ids grow from call to call"
            )
        elif self._under_way >= CALLS_MAX:
            await refuse(
                frame.stream_id, status.RESOURCE_EXHAUSTED, f"{CALLS_MAX} calls are under way"
            )
        else:
            self._last_stream_id = frame.stream_id
            self._under_way += 1
            self._calls.start(self._call(frame), name="ttrpc call")

    async def _call(self, frame: Frame) -> None:
        try:
            response = await self._answer(frame.payload)
            try:
                packed = Frame(frame.stream_id, RESPONSE, response.SerializeToString()).pack()
            except MessageTooLarge as error:
                response = _failure(status.RESOURCE_EXHAUSTED, str(error))
                packed = Frame(frame.stream_id, RESPONSE, response.SerializeToString()).pack()
            await self._write(packed)
        finally:
            self._under_way -= 1

    async def _answer(self, payload: bytes) -> request_pb2.Response:
        try:
            request = request_pb2.Request.FromString(payload)
        except DecodeError:
            return _failure(status.INVALID_ARGUMENT, "the request cannot be decoded")
        service = self._services.get(request.service)
        if service is None:
            return _failure(status.UNIMPLEMENTED, f"service {request.service}")
        method = service.get(request.method)
        if method is None:
            return _failure(status.UNIMPLEMENTED, f"method {request.method}")
        return await _handle(method, request)

    async def _refuse(self, stream_id: int, code: int, message: str) -> None:
        response = _failure(code, message)
        await self._write(Frame(stream_id, RESPONSE, response.SerializeToString()).pack())

    async def _write(self, data: bytes) -> None:
        self._writer.write(data)
        with suppress(ConnectionError):  # the reading side sees it too
            await self._writer.drain()


async def _handle(method: Method, request: request_pb2.Request) -> request_pb2.Response:
    """Run a method; what it raises becomes a status, and anything unforeseen INTERNAL."""
    identity = new_request_id()
    request_id.set(identity)
    structlog.contextvars.bind_contextvars(request_id=identity)
    began = time.perf_counter()
    name = f"{request.service}/{request.method}"
    try:
        message = method.request.FromString(request.payload)
        limit_s = request.timeout_nano / 1e9 if request.timeout_nano > 0 else None
        async with asyncio.timeout(limit_s):
            response = await method.handler(message)
    except DecodeError:
        return _failure(status.INVALID_ARGUMENT, f"the request of {name} cannot be decoded")
    except TheseusError as error:
        log.info("call failed", method=name, code=status.code_of(error), error=error.message)
        return _failure(status.code_of(error), error.message)
    except TimeoutError as error:
        log.warning("call timed out", method=name, exc_info=error)
        return _failure(status.DEADLINE_EXCEEDED, f"{name} did not end within its time limit")
    except Exception as error:
        log.error("call broke", method=name, exc_info=error)
        return _failure(
            status.INTERNAL, f"internal error in {name}: see the log for request {identity}"
        )
    log.debug("call handled", method=name, seconds=round(time.perf_counter() - began, 6))
    return request_pb2.Response(payload=response.SerializeToString())


def _failure(code: int, message: str) -> request_pb2.Response:
    return request_pb2.Response(status=status_pb2.Status(code=code, message=message))
