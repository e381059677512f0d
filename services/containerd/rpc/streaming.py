"""``containerd.services.streaming.v1.Streaming``: streams that belong to other calls.

A client opens a stream under an id of its choice, waits for the first answer, and names the id in
another request (a transfer), which then talks over it: bytes, progress, questions for credentials.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, TypeVar

from google.protobuf.any_pb2 import Any
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import DecodeError

from protos.containerd.services.streaming.v1 import streaming_pb2, streaming_pb2_grpc
from protos.containerd.types.transfer.streaming_pb2 import Data, WindowUpdate
from services.common.errors import AlreadyExists, Cancelled, InvalidArgument, NotFound
from services.common.server import metadata_value, request_namespace
from services.containerd.rpc.leases import LEASE_KEY

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

    from google.protobuf.message import Message

    from services.containerd.rpc.context import Context

M = TypeVar("M", bound="Message")

_INIT_TIMEOUT_S = 10.0
_DATA_MAX_BYTES = 32 << 10  # what clients of containerd expect in one message
_WINDOW_BYTES = 1 << 20  # how much a sender may be ahead of us
_QUEUED = 16


def pack(message: Message) -> Any:
    """A message in ``Any`` the way containerd has it: its type URL is the bare name."""
    return Any(type_url=message.DESCRIPTOR.full_name, value=message.SerializeToString())


def unpack(value: Any, kind: type[M]) -> M:
    """The message in an ``Any``.

    Raises:
        InvalidArgument: it is another message, or broken.
    """
    name = value.type_url.rpartition("/")[2]
    wanted = kind.DESCRIPTOR.full_name
    if name != wanted:
        raise InvalidArgument(f"a {wanted} was expected, got a {name or 'message without a type'}")
    try:
        return kind.FromString(value.value)
    except DecodeError as error:
        raise InvalidArgument(f"the {wanted} cannot be decoded") from error


class OpenStream:
    """One stream of a client, for the call that it belongs to."""

    def __init__(self, lease: str = "") -> None:
        self.lease = lease
        self._inbound: asyncio.Queue[Any | None] = asyncio.Queue(_QUEUED)
        self._outbound: asyncio.Queue[Any | None] = asyncio.Queue(_QUEUED)
        self._gone = False

    async def send(self, message: Message) -> None:
        """Send a message; waits while the client does not read.

        Raises:
            Cancelled: the client has ended the stream.
        """
        if not self._gone:
            await self._outbound.put(pack(message))
        if self._gone:
            raise Cancelled("the client has ended a stream that is still needed")

    async def receive(self) -> Any | None:
        """The next message; None when the client will send no more.

        Raises:
            Cancelled: the client has gone away.
        """
        value = await self._inbound.get()
        if value is None:
            await self._inbound.put(None)  # the end stays the end
            if self._gone:
                raise Cancelled("the client has ended a stream that is still needed")
        return value

    async def close(self) -> None:
        """Send what is waiting, then end the stream. Idempotent."""
        if not self._gone:
            await self._outbound.put(None)

    # What follows serves the handler of the stream.

    async def fill(self, requests: AsyncIterator[Any]) -> None:
        """Take in what the client sends, until it ends."""
        async for value in requests:
            await self._inbound.put(value)
        await self._inbound.put(None)

    async def drain(self) -> AsyncIterator[Any]:
        """What is to be sent, until ``close``."""
        while (value := await self._outbound.get()) is not None:
            yield value

    def abandon(self) -> None:
        """Nobody is at the other end any more: wake whoever waits."""
        self._gone = True
        for queue in (self._inbound, self._outbound):
            while not queue.empty():
                queue.get_nowait()
        self._inbound.put_nowait(None)


class StreamRegister:
    """The open streams, by namespace and id."""

    def __init__(self) -> None:
        self._streams: dict[tuple[str, str], OpenStream] = {}

    def add(self, namespace: str, stream_id: str, stream: OpenStream) -> None:
        """Make a stream known.

        Raises:
            AlreadyExists: the id is in use.
        """
        if (namespace, stream_id) in self._streams:
            raise AlreadyExists(f"stream {stream_id!r} exists already")
        self._streams[namespace, stream_id] = stream

    def get(self, namespace: str, stream_id: str) -> OpenStream:
        """The stream of that id.

        Raises:
            NotFound: there is none.
        """
        stream = self._streams.get((namespace, stream_id))
        if stream is None:
            raise NotFound(
                f"stream {stream_id!r} does not exist: open it before the call that names it",
                resource=("stream", stream_id),
            )
        return stream

    def remove(self, namespace: str, stream_id: str) -> None:
        """Forget a stream."""
        self._streams.pop((namespace, stream_id), None)

    def __len__(self) -> int:
        return len(self._streams)


class StreamingService(streaming_pb2_grpc.StreamingServicer):
    """Serves streams, and keeps them in ``register`` while they last."""

    def __init__(self, register: StreamRegister) -> None:
        self._register = register

    async def Stream(
        self, request_iterator: AsyncIterator[Any], context: Context
    ) -> AsyncIterator[Any]:
        """See the contract."""
        namespace = request_namespace(context)
        try:
            async with asyncio.timeout(_INIT_TIMEOUT_S):
                first = await anext(request_iterator, None)
        except TimeoutError:
            raise InvalidArgument("no first message came: send StreamInit") from None
        if first is None:
            raise InvalidArgument("the stream ended before its first message: send StreamInit")
        stream_id = unpack(first, streaming_pb2.StreamInit).id
        stream = OpenStream(metadata_value(context, LEASE_KEY))
        self._register.add(namespace, stream_id, stream)
        filling = asyncio.create_task(stream.fill(request_iterator), name=f"stream {stream_id}")
        try:
            yield pack(Empty())
            async for value in stream.drain():
                yield value
        finally:
            self._register.remove(namespace, stream_id)
            stream.abandon()
            filling.cancel()
            with suppress(asyncio.CancelledError):
                await filling


async def receive_bytes(stream: OpenStream) -> AsyncGenerator[bytes, None]:
    """The bytes that a client sends, granting it ``_WINDOW_BYTES`` ahead.

    Raises:
        Cancelled: the client went away before it had ended the bytes.
        InvalidArgument: it sent something else.
    """
    window = 0
    while True:
        if window < _WINDOW_BYTES:
            await stream.send(WindowUpdate(update=_WINDOW_BYTES))
            window += _WINDOW_BYTES
        value = await stream.receive()
        if value is None:
            return
        data = unpack(value, Data).data
        window -= len(data)
        yield data


async def send_bytes(stream: OpenStream, source: AsyncIterator[bytes]) -> None:
    """Send bytes to a client, no more than it grants, and end the stream.

    Raises:
        Cancelled: the client went away before it had them all.
        InvalidArgument: it sent something else than grants.
    """
    granted = 0
    async for piece in source:
        view = memoryview(piece)
        while view:
            while granted <= 0:
                value = await stream.receive()
                if value is None:
                    raise Cancelled("the client ended its side before it had all bytes")
                granted += unpack(value, WindowUpdate).update
            part = view[: min(granted, _DATA_MAX_BYTES)]
            await stream.send(Data(data=bytes(part)))
            granted -= len(part)
            view = view[len(part) :]
    await stream.close()
