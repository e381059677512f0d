"""A ttrpc server: calls of several services on one Unix socket.

Calls of a connection run at the same time, each a task; when the peer hangs up they are cancelled,
and one alone when it says so (a frame of ours). What a call must finish all the same, its handler
shields. A connection that begins as no frame can is a stranger's, and may be somebody else's to
serve.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, cast

import structlog
from google.protobuf.message import DecodeError
from google.rpc import status_pb2

from protos.containerd.ttrpc import request_pb2
from services.common.background import Background
from services.common.errors import TheseusError
from services.common.frozen import frozen
from services.common.request import new_request_id, request_id
from services.common.ttrpc import status
from services.common.ttrpc.connection import FrameConnection
from services.common.ttrpc.frames import (
    CANCEL,
    DATA,
    NO_DATA,
    REMOTE_CLOSED,
    REMOTE_OPEN,
    REQUEST,
    RESPONSE,
    Frame,
    MessageTooLarge,
)
from services.common.ttrpc.inbox import Inbox

if TYPE_CHECKING:
    import socket
    from collections.abc import Mapping

    from google.protobuf.message import Message

log = structlog.get_logger(__name__)

CALLS_MAX = 1024
"""Calls that one connection may have under way."""


class Call:
    """A call that is served.

    Attributes:
        service: full name.
        method: its name.
        payload: the request, serialized; empty where the client streams.
        metadata: keys and values, as they came.
        timeout_s: how long the client waits; None: it does not say.
        inbox: what a client that streams sends; None: it does not.
    """

    def __init__(
        self,
        connection: FrameConnection,
        stream_id: int,
        request: request_pb2.Request,
        inbox: Inbox | None,
    ) -> None:
        self.service = request.service
        self.method = request.method
        self.payload = request.payload
        self.metadata = [(pair.key, pair.value) for pair in request.metadata]
        self.timeout_s = request.timeout_nano / 1e9 if request.timeout_nano > 0 else None
        self.inbox = inbox
        self._connection = connection
        self._stream_id = stream_id

    async def send(self, message: bytes) -> None:
        """Send one of several responses; to a client that is gone nothing happens.

        Raises:
            MessageTooLarge: no client would take it.
        """
        self._connection.send(Frame(self._stream_id, DATA, message).pack())
        await self._connection.drain()


Route = Callable[[Call], Awaitable[request_pb2.Response]]
"""Answers a call; raises nothing but CancelledError."""

Stranger = Callable[[asyncio.Transport, bytes], None]
"""Takes over a connection that is not ttrpc's, with what it has sent so far."""


class TtrpcServer:
    """Serves calls.

    Args:
        route: answers each.
        stranger: takes connections that speak something else; None: they are closed.
    """

    def __init__(self, route: Route, *, stranger: Stranger | None = None) -> None:
        self._route = route
        self._stranger = stranger
        self._calls = Background()
        self._connections: set[_Connection] = set()
        self._silent: set[asyncio.BaseTransport] = set()
        self._server: asyncio.Server | None = None
        self._has_ended = False

    async def start(self, listener: socket.socket) -> None:
        """Serve a listening socket, which becomes the server's."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_unix_server(self._accept, sock=listener)

    def stop_listening(self) -> None:
        """Take no more connections; calls go on."""
        if self._server is not None:
            self._server.close()
            self._server = None

    async def stop(self, grace_s: float = 0.0) -> None:
        """End everything; calls under way get ``grace_s`` seconds to finish."""
        self.stop_listening()
        if grace_s:
            await self._calls.finish(grace_s)
        self._has_ended = True
        for connection in list(self._connections):
            connection.hang_up()
        for transport in list(self._silent):  # whoever has not spoken yet would wait for ever
            transport.close()
        await self._calls.stop()

    def _accept(self) -> asyncio.Protocol:
        return _Greeting(self)

    def greet(self, transport: asyncio.BaseTransport) -> None:
        """Take in a connection of which nothing is known yet."""
        self._silent.add(transport)
        if self._has_ended:  # it was accepted before that
            transport.close()

    def lose(self, transport: asyncio.BaseTransport) -> None:
        """Forget one that has hung up without a word."""
        self._silent.discard(transport)

    def meet(self, transport: asyncio.Transport, data: bytes) -> None:
        """Find out what one speaks by its first bytes."""
        self._silent.discard(transport)
        # A message's length begins with a zero, up to 16 MiB.
        if data[0] == 0:
            connection = _Connection(self._route, self._calls, self._connections.discard)
            self._connections.add(connection)
            connection.begin(transport, data)
        elif self._stranger is not None:
            self._stranger(transport, data)
        else:
            log.info("a connection does not speak ttrpc")
            transport.close()


class _Greeting(asyncio.Protocol):
    def __init__(self, server: TtrpcServer) -> None:
        self._server = server
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._server.greet(transport)

    def data_received(self, data: bytes) -> None:
        assert self._transport is not None
        self._server.meet(self._transport, data)

    def connection_lost(self, error: Exception | None) -> None:
        del error
        assert self._transport is not None
        self._server.lose(self._transport)


class _Connection:
    def __init__(
        self, route: Route, calls: Background, lost: Callable[[_Connection], None]
    ) -> None:
        self._route = route
        self._background = calls
        self._lost = lost
        self._calls: dict[int, tuple[asyncio.Task[None], Inbox | None]] = {}
        self._last_stream_id = 0
        self._frames = FrameConnection(
            received=self._take, refused=self._too_large, lost=self._hung_up
        )

    def begin(self, transport: asyncio.Transport, data: bytes) -> None:
        transport.set_protocol(self._frames)
        self._frames.connection_made(transport)
        self._frames.data_received(data)

    def hang_up(self) -> None:
        self._frames.close()
        self._end_calls()

    def _hung_up(self) -> None:
        self._end_calls()
        self._lost(self)

    def _end_calls(self) -> None:
        for task, _ in self._calls.values():
            task.cancel()

    def _too_large(self, error: MessageTooLarge) -> None:
        self._refuse(error.stream_id, status.RESOURCE_EXHAUSTED, str(error))

    def _take(self, frame: Frame) -> None:
        if frame.kind == REQUEST:
            self._begin_call(frame)
        elif frame.kind == DATA:
            self._take_data(frame)
        elif frame.kind == CANCEL and frame.stream_id in self._calls:
            self._calls[frame.stream_id][0].cancel()
        # All others are of a later version of the protocol.

    def _begin_call(self, frame: Frame) -> None:
        refuse = self._refuse
        if frame.stream_id % 2 != 1:
            refuse(frame.stream_id, status.INVALID_ARGUMENT, "a client's stream id is odd")
        elif frame.stream_id <= self._last_stream_id:
            refuse(frame.stream_id, status.INVALID_ARGUMENT, "stream ids grow from call to call")
        elif len(self._calls) >= CALLS_MAX:
            refuse(frame.stream_id, status.RESOURCE_EXHAUSTED, f"{CALLS_MAX} calls are under way")
        else:
            self._last_stream_id = frame.stream_id
            inbox = Inbox(self._frames) if frame.flags & REMOTE_OPEN else None
            task = self._background.start(self._call(frame, inbox), name="ttrpc call")
            self._calls[frame.stream_id] = task, inbox

    def _take_data(self, frame: Frame) -> None:
        inbox = self._calls[frame.stream_id][1] if frame.stream_id in self._calls else None
        if inbox is None:
            if frame.stream_id % 2 != 1:
                reason = "a client's stream id is odd"
            else:
                reason = "the stream is not active"
            self._refuse(frame.stream_id, status.INVALID_ARGUMENT, reason)
            return
        if not frame.flags & NO_DATA:
            inbox.put(frame.payload)
        if frame.flags & REMOTE_CLOSED:
            inbox.end()

    async def _call(self, frame: Frame, inbox: Inbox | None) -> None:
        try:
            try:
                request = request_pb2.Request.FromString(frame.payload)
            except DecodeError:
                reason = "the request cannot be decoded"
                response = failure(status.INVALID_ARGUMENT, reason)
            else:
                response = await self._route(Call(self._frames, frame.stream_id, request, inbox))
        finally:
            del self._calls[frame.stream_id]
        try:
            packed = Frame(frame.stream_id, RESPONSE, response.SerializeToString()).pack()
        except MessageTooLarge as error:
            self._refuse(frame.stream_id, status.RESOURCE_EXHAUSTED, str(error))
            return
        self._frames.send(packed)
        await self._frames.drain()

    def _refuse(self, stream_id: int, code: int, message: str) -> None:
        response = failure(code, message)
        self._frames.send(Frame(stream_id, RESPONSE, response.SerializeToString()).pack())


@frozen
class Method:
    """A unary method: the class of its request, and what answers it."""

    request: type[Message]
    handler: Callable[[Any], Awaitable[Message]]


def methods(services: Mapping[str, Mapping[str, Method]]) -> Route:
    """Serves methods by full service name and method name."""

    async def answer(call: Call) -> request_pb2.Response:
        service = services.get(call.service)
        if service is None:
            return failure(status.UNIMPLEMENTED, f"service {call.service}")
        method = service.get(call.method)
        if method is None:
            return failure(status.UNIMPLEMENTED, f"method {call.method}")
        return await _handle(method, call)

    return answer


async def _handle(method: Method, call: Call) -> request_pb2.Response:
    """Run a method; what it raises becomes a status, and anything unforeseen INTERNAL."""
    identity = new_request_id()
    request_id.set(identity)
    structlog.contextvars.bind_contextvars(request_id=identity)
    began = time.perf_counter()
    name = f"{call.service}/{call.method}"
    try:
        message = method.request.FromString(call.payload)
        async with asyncio.timeout(call.timeout_s):
            response = await method.handler(message)
    except DecodeError:
        return failure(status.INVALID_ARGUMENT, f"the request of {name} cannot be decoded")
    except TheseusError as error:
        log.info("call failed", method=name, code=status.code_of(error), error=error.message)
        return failure(status.code_of(error), error.message)
    except TimeoutError as error:
        log.warning("call timed out", method=name, exc_info=error)
        return failure(status.DEADLINE_EXCEEDED, f"{name} did not end within its time limit")
    except Exception as error:
        log.error("call broke", method=name, exc_info=error)
        return failure(
            status.INTERNAL, f"internal error in {name}: see the log for request {identity}"
        )
    log.debug("call handled", method=name, seconds=round(time.perf_counter() - began, 6))
    return request_pb2.Response(payload=response.SerializeToString())


def failure(code: int, message: str) -> request_pb2.Response:
    """The response of a call that failed."""
    return request_pb2.Response(status=status_pb2.Status(code=code, message=message))
