"""A call whose messages stream both ways, as bytes, over ttrpc or gRPC."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import grpc

from services.common.errors import ResourceExhausted, TheseusError, Unavailable
from services.common.rpc_errors import error_of, from_rpc_error
from services.common.ttrpc.client import CallFailed, ClientStream, TtrpcClient
from services.common.ttrpc.frames import MessageTooLarge

if TYPE_CHECKING:
    from collections.abc import Callable


class MessageStream(Protocol):
    """One call. Every method raises what the peer failed with, and Unavailable if it is gone."""

    async def send(self, message: bytes) -> None:
        """Send a message; once the call has ended nothing happens."""

    async def end(self) -> None:
        """Send no more."""

    async def receive(self) -> bytes | None:
        """The next message; None at the call's end."""

    def close(self) -> None:
        """Give the call up if it still goes on. Idempotent."""


class TtrpcStream:
    """A stream that has a connection of its own.

    Args:
        client: the connection, which becomes the stream's.
        stream: the call.
        failed: called when the connection breaks.
    """

    def __init__(
        self, client: TtrpcClient, stream: ClientStream, failed: Callable[[], None] = lambda: None
    ) -> None:
        self._client = client
        self._stream = stream
        self._failed = failed

    async def send(self, message: bytes) -> None:
        """As ``MessageStream.send``."""
        try:
            await self._stream.send(message)
        except (ConnectionError, MessageTooLarge) as error:
            raise self._in_our_words(error) from None

    async def end(self) -> None:
        """As ``MessageStream.end``."""
        try:
            await self._stream.end()
        except ConnectionError as error:
            raise self._in_our_words(error) from None

    async def receive(self) -> bytes | None:
        """As ``MessageStream.receive``."""
        try:
            return await self._stream.receive()
        except (CallFailed, ConnectionError) as error:
            raise self._in_our_words(error) from None

    def close(self) -> None:
        """As ``MessageStream.close``."""
        self._stream.close()
        self._client.close()

    def _in_our_words(self, error: Exception) -> TheseusError:
        if isinstance(error, CallFailed):
            return error_of(error.status)
        if isinstance(error, MessageTooLarge):
            return ResourceExhausted(str(error))
        self._failed()
        return Unavailable(str(error))


class GrpcStream:
    """A call of a gRPC channel.

    Args:
        call: made without serializers and without an iterator.
        failed: called when the peer is gone.
    """

    def __init__(self, call: Any, failed: Callable[[], None] = lambda: None) -> None:
        self._call = call
        self._failed = failed

    async def send(self, message: bytes) -> None:
        """As ``MessageStream.send``."""
        try:
            if not self._call.done():
                await self._call.write(message)
        except grpc.aio.AioRpcError as error:
            raise self._in_our_words(error) from None

    async def end(self) -> None:
        """As ``MessageStream.end``."""
        try:
            if not self._call.done():
                await self._call.done_writing()
        except grpc.aio.AioRpcError as error:
            raise self._in_our_words(error) from None

    async def receive(self) -> bytes | None:
        """As ``MessageStream.receive``."""
        try:
            message = await self._call.read()
        except grpc.aio.AioRpcError as error:
            raise self._in_our_words(error) from None
        return None if message is grpc.aio.EOF else message

    def close(self) -> None:
        """As ``MessageStream.close``."""
        self._call.cancel()

    def _in_our_words(self, error: grpc.aio.AioRpcError) -> TheseusError:
        found = from_rpc_error(error)
        if isinstance(found, Unavailable):
            self._failed()
        return found
