"""Holds calls back while the shim changes hands.

A call that comes while the gate is closed waits: either the gate opens again and nobody noticed, or
the process is executed anew, the connection breaks, and the caller asks again. Calls that wait for
the end of a process or a sandbox, for the acknowledgement of events, or are attached, are not
counted: they break. Of an attach that starts an exec the start counts.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import grpc

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from grpc.aio import ServicerContext

    Context = ServicerContext[Any, Any]

_PASS = frozenset({"Wait", "WaitSandbox", "Reexec", "Info", "Metrics", "Leave"})
# A handler's return is not its answer's departure; nothing tells when that is on the socket.
_FLUSH_S = 0.01


class Gate(grpc.aio.ServerInterceptor):
    """Open at first. Reexec passes a closed gate, and so do calls that change nothing."""

    def __init__(self) -> None:
        self._open = asyncio.Event()
        self._open.set()
        self._inside = 0
        self._left = asyncio.Event()

    def open(self) -> None:
        """Let the calls in that wait."""
        self._open.set()

    def shut(self) -> None:
        """Let no call in."""
        self._open.clear()

    async def close(self) -> None:
        """Let no call in, and wait until those inside have been answered."""
        self._open.clear()
        while self._inside:
            self._left.clear()
            await self._left.wait()
        await asyncio.sleep(_FLUSH_S)

    @asynccontextmanager
    async def inside(self) -> AsyncIterator[None]:
        """Wait until it is open; the block counts as a call."""
        await self._open.wait()
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1
            self._left.set()

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        """Wrap the unary methods that are not free to pass."""
        handler = await continuation(handler_call_details)
        name = handler_call_details.method.rpartition("/")[2]
        if handler is None or handler.unary_unary is None or name in _PASS:
            return handler
        behaviour = handler.unary_unary

        async def call(request: Any, context: Context) -> Any:
            async with self.inside():
                return await behaviour(request, context)

        return grpc.unary_unary_rpc_method_handler(
            call,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )
