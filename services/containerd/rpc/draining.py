"""What a stop does to calls that may take for ever: they end with UNAVAILABLE, to be asked again.

Other calls get the time to finish that the server gives them.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, TypeVar

import grpc

from services.common.errors import Unavailable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine

    from services.containerd.rpc.context import Context

T = TypeVar("T")

ENDLESS_METHODS = frozenset(
    {
        "/containerd.services.tasks.v1.Tasks/Wait",
        "/theseus.shim.v1.Streams/Attach",
    }
)
"""Calls that wait for a process. Readers of events are told by the journal itself."""


class DrainInterceptor(grpc.aio.ServerInterceptor):
    """Ends endless calls once ``drain`` was called."""

    def __init__(self) -> None:
        self._draining = asyncio.Event()

    def drain(self) -> None:
        """End the endless calls that are under way, and those that still come."""
        self._draining.set()

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        """Wrap the handlers of the methods in question."""
        handler = await continuation(handler_call_details)
        if handler is None or handler_call_details.method not in ENDLESS_METHODS:
            return handler
        if handler.stream_stream is not None:
            return grpc.stream_stream_rpc_method_handler(
                self._streaming(handler.stream_stream),
                request_deserializer=handler.request_deserializer,
                response_serializer=handler.response_serializer,
            )
        return grpc.unary_unary_rpc_method_handler(
            self._unary(handler.unary_unary),
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

    def _unary(self, behaviour: Any) -> Any:
        async def call(request: Any, context: Context) -> Any:
            return await self._unless_draining(behaviour(request, context))

        return call

    def _streaming(self, behaviour: Any) -> Any:
        async def call(requests: Any, context: Context) -> AsyncIterator[Any]:
            responses = behaviour(requests, context)
            try:
                while (response := await self._unless_draining(_next(responses))) is not None:
                    yield response
            finally:
                await responses.aclose()

        return call

    async def _unless_draining(self, work: Coroutine[Any, Any, T]) -> T:
        working = asyncio.ensure_future(work)
        draining = asyncio.ensure_future(self._draining.wait())
        try:
            await asyncio.wait((working, draining), return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                return working.result()
        finally:
            for task in (working, draining):
                task.cancel()
            await asyncio.gather(working, draining, return_exceptions=True)
        raise Unavailable("containerd is stopping: ask again when it is back", retry_after_s=0.1)


async def _next(responses: AsyncIterator[Any]) -> Any:
    return await anext(responses, None)
