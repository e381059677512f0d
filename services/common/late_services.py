"""Services that are made for their first call, so that a start need not import their code.

Their methods are known by the names of the services alone. The first call of one waits while they
are made, whatever its kind is: it is taken as two streams of bytes, which on the wire a call of any
kind is. Later calls find the methods as those of any other service.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import grpc
import structlog

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from services.common.server import Methods, Service

    Context = grpc.aio.ServicerContext[Any, Any]

log = structlog.get_logger(__name__)


class LateServices:
    """Services that come together.

    Args:
        names: their full names.
        make: gives them. It is awaited for the first call, again for the next if it fails.

    Attributes:
        made: they are there.
    """

    def __init__(self, names: Sequence[str], make: Callable[[], Awaitable[Sequence[Service]]]):
        self.names = tuple(names)
        self._make = make
        self._lock = asyncio.Lock()
        self.made = False

    async def load(self, methods: Methods) -> None:
        """Add the services to ``methods``, unless that was done."""
        async with self._lock:
            if not self.made:
                for service in await self._make():
                    service.add(service.servicer, methods)
                self.made = True
                log.debug("services made", services=self.names)

    def handler(self, method: str, methods: Methods) -> Any:
        """A handler for calls of ``method`` that come before the services are there."""
        return _Method(method, self, methods).handler


class _Method:
    def __init__(self, name: str, services: LateServices, methods: Methods) -> None:
        self._name = name
        self._services = services
        self._methods = methods
        self._real: Any = None
        self.handler: Any = grpc.stream_stream_rpc_method_handler(
            self._answer, request_deserializer=None, response_serializer=self._serialize
        )

    async def _answer(self, messages: AsyncIterator[bytes], context: Context) -> None:
        try:
            await self._services.load(self._methods)
        except Exception as error:
            log.error("services cannot be made", services=self._services.names, exc_info=error)
            await context.abort(
                grpc.StatusCode.INTERNAL, f"the service of {self._name} does not start: see the log"
            )
        self._real = self._methods.find(self._name)
        if self._real is None:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
        await self._pass_on(self._parsed(messages), context)

    async def _pass_on(self, requests: AsyncIterator[Any], context: Context) -> None:
        real = self._real
        request: Any = requests if real.request_streaming else await anext(requests)
        behaviour = real.stream_stream or real.unary_stream or real.stream_unary or real.unary_unary
        response = await behaviour(request, context)
        if not real.response_streaming and response is not None:  # else the status says why not
            await context.write(response)

    async def _parsed(self, messages: AsyncIterator[bytes]) -> AsyncIterator[Any]:
        parse = self._real.request_deserializer
        async for message in messages:
            yield parse(message) if parse else message

    def _serialize(self, response: Any) -> bytes:
        serialize = self._real.response_serializer
        data: bytes = serialize(response) if serialize else response
        return data
