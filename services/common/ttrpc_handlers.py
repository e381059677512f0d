"""Serves over ttrpc what was written for gRPC: servicers, interceptors, contexts.

A handler is looked up, and wrapped by the interceptors, once per method: what an interceptor does
to a call may depend on the method alone. Nothing of gRPC's runtime is started: no thread, no queue.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import status_pb2

from protos.containerd.ttrpc import request_pb2
from services.common.frozen import frozen
from services.common.rpc_errors import DETAILS_KEY
from services.common.ttrpc import status
from services.common.ttrpc.frames import MessageTooLarge
from services.common.ttrpc.server import failure

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Sequence

    from services.common.server import Methods
    from services.common.ttrpc.inbox import Inbox
    from services.common.ttrpc.server import Call


class Handlers:
    """Answers calls by ``methods``; ``answer`` is a ``Route``.

    Args:
        methods: to which generated code has added the services.
        interceptors: see a call before it is counted, the first first.
    """

    def __init__(
        self, methods: Methods, interceptors: Sequence[grpc.aio.ServerInterceptor] = ()
    ) -> None:
        self._methods = methods
        self._interceptors = interceptors
        self._found: dict[tuple[str, str], Any] = {}

    async def answer(self, call: Call) -> request_pb2.Response:
        """Answer a call."""
        handler = await self.find(call.service, call.method)
        if handler is None:
            return failure(status.UNIMPLEMENTED, f"method {call.method} of service {call.service}")
        if handler.request_streaming != (call.inbox is not None):
            kind = "a stream of requests" if handler.request_streaming else "one request"
            return failure(status.INVALID_ARGUMENT, f"{call.service}/{call.method} takes {kind}")
        context = _Context(call, handler.response_serializer)
        try:
            payload = await self._run(handler, call, context)
        except DecodeError:
            return failure(status.INVALID_ARGUMENT, "the request cannot be decoded")
        except MessageTooLarge as error:
            return failure(status.RESOURCE_EXHAUSTED, str(error))
        finally:
            context.end()
        return context.failure or request_pb2.Response(payload=payload)

    async def find(self, service: str, method: str) -> Any:
        """The handler of a method, which is kept for its calls; None if there is none."""
        key = service, method
        handler = self._found.get(key)
        if handler is None:
            details: Any = _Details(f"/{service}/{method}")
            handler = await self._find(0, details)
            if handler is not None:
                self._found[key] = handler
        return handler

    async def _run(self, handler: Any, call: Call, context: _Context) -> bytes:
        if call.inbox is not None:
            request: Any = _messages(call.inbox, handler.request_deserializer)
        else:
            request = handler.request_deserializer(call.payload)
        if handler.response_streaming:
            behaviour = handler.stream_stream or handler.unary_stream
            await behaviour(request, context)
            return b""
        behaviour = handler.unary_unary or handler.stream_unary
        response = await behaviour(request, context)
        return b"" if response is None else handler.response_serializer(response)

    async def _find(self, number: int, details: Any) -> Any:
        if number == len(self._interceptors):
            return self._methods.service(details)

        async def following(again: Any) -> Any:
            return await self._find(number + 1, again)

        return await self._interceptors[number].intercept_service(following, details)


@frozen
class _Details:
    method: str
    invocation_metadata: tuple[tuple[str, str], ...] = ()


class _Context:
    """What a servicer sees of its call: the part of ``grpc.aio.ServicerContext`` that ours use."""

    def __init__(self, call: Call, serialize: Callable[[Any], bytes]) -> None:
        self._call = call
        self._serialize = serialize
        self._code: grpc.StatusCode | None = None
        self._details = ""
        self._trailers: Iterable[tuple[str, str | bytes]] = ()
        self._callbacks: list[Callable[[_Context], None]] = []

    @property
    def failure(self) -> request_pb2.Response | None:
        """The response that the servicer's status makes; None where that is OK."""
        if self._code is None or self._code is grpc.StatusCode.OK:
            return None
        for key, value in self._trailers:
            if key == DETAILS_KEY and isinstance(value, bytes):
                return request_pb2.Response(status=status_pb2.Status.FromString(value))
        return failure(self._code.value[0], self._details)

    def invocation_metadata(self) -> Sequence[tuple[str, str]]:
        return self._call.metadata

    def set_code(self, code: grpc.StatusCode) -> None:
        self._code = code

    def set_details(self, details: str) -> None:
        self._details = details

    def set_trailing_metadata(self, trailers: Iterable[tuple[str, str | bytes]]) -> None:
        self._trailers = trailers

    def add_done_callback(self, callback: Callable[[_Context], None]) -> None:
        self._callbacks.append(callback)

    async def write(self, response: Any) -> None:
        await self._call.send(self._serialize(response))

    def end(self) -> None:
        """The call is over."""
        for callback in self._callbacks:
            callback(self)


async def _messages(inbox: Inbox, deserialize: Callable[[bytes], Any]) -> AsyncIterator[Any]:
    while (message := await inbox.get()) is not None:
        yield deserialize(message)
