"""Streams of messages over ttrpc and gRPC: implement ``message_stream.MessageStream``."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import grpc

from services.common.errors import ResourceExhausted, Unavailable
from services.common.rpc_errors import error_of, translated
from services.common.ttrpc.client import CallFailed, ClientStream, TtrpcClient
from services.common.ttrpc.frames import MessageTooLarge

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


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
        with self._in_our_words():
            await self._stream.send(message)

    async def end(self) -> None:
        """As ``MessageStream.end``."""
        with self._in_our_words():
            await self._stream.end()

    async def receive(self) -> bytes | None:
        """As ``MessageStream.receive``."""
        with self._in_our_words():
            return await self._stream.receive()

    def close(self) -> None:
        """As ``MessageStream.close``."""
        self._stream.close()
        self._client.close()

    @contextmanager
    def _in_our_words(self) -> Iterator[None]:
        try:
            yield
        except CallFailed as error:
            raise error_of(error.status) from None
        except MessageTooLarge as error:
            raise ResourceExhausted(str(error)) from None
        except ConnectionError as error:
            self._failed()
            raise Unavailable(str(error)) from None


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
        with self._in_our_words():
            if not self._call.done():
                await self._call.write(message)

    async def end(self) -> None:
        """As ``MessageStream.end``."""
        with self._in_our_words():
            if not self._call.done():
                await self._call.done_writing()

    async def receive(self) -> bytes | None:
        """As ``MessageStream.receive``."""
        with self._in_our_words():
            message = await self._call.read()
        return None if message is grpc.aio.EOF else message

    def close(self) -> None:
        """As ``MessageStream.close``."""
        self._call.cancel()

    @contextmanager
    def _in_our_words(self) -> Iterator[None]:
        try:
            with translated():
                yield
        except Unavailable:
            self._failed()
            raise
