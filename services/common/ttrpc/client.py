"""A ttrpc client: one connection to a Unix socket, any number of calls at the same time."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Self

from google.protobuf.message import DecodeError

from protos.containerd.ttrpc import request_pb2
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
    from collections.abc import Iterable
    from pathlib import Path
    from types import TracebackType

    from google.rpc.status_pb2 import Status


class CallFailed(Exception):
    """The peer answered with a status that is not OK.

    Attributes:
        status: it.
    """

    def __init__(self, status: Status) -> None:
        super().__init__(status.message)
        self.status = status
        self.code = status.code


class TtrpcClient:
    """A connection, made by :meth:`connect`; an async context manager that closes it.

    Args:
        tells: whether the peer, one of ours, is told of calls that are given up.
    """

    def __init__(self, *, tells: bool = False) -> None:
        self._tells = tells
        self._stream_id = -1
        self._answers: dict[int, asyncio.Future[request_pb2.Response]] = {}
        self._inboxes: dict[int, Inbox] = {}
        self._broken: ConnectionError | None = None
        self._connection = FrameConnection(
            received=self._take, refused=self._too_large, lost=self._hung_up
        )

    @classmethod
    async def connect(cls, path: Path | str, *, tells: bool = False) -> Self:
        """Connect.

        Raises:
            OSError: nobody listens there.
        """
        client = cls(tells=tells)
        loop = asyncio.get_running_loop()
        await loop.create_unix_connection(lambda: client._connection, str(path))
        return client

    @property
    def broken(self) -> bool:
        """Whether the connection is of no more use."""
        return self._broken is not None

    @property
    def alien(self) -> bool:
        """Whether the peer turned out to speak something else: gRPC."""
        return self._connection.alien

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; calls under way end with ConnectionError. Idempotent."""
        self._break(ConnectionError("the connection was closed"))

    async def call(
        self,
        service: str,
        method: str,
        payload: bytes,
        *,
        timeout_s: float,
        metadata: Iterable[tuple[str, str]] = (),
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
            metadata=_pairs(metadata),
        )
        stream_id = self._begin(request, 0)
        answer = self._answers[stream_id]
        try:
            async with asyncio.timeout(timeout_s):
                await self._connection.drain()
                response: request_pb2.Response = await answer
        except (asyncio.CancelledError, TimeoutError):
            if self._tells:
                self._connection.send(Frame(stream_id, CANCEL).pack())
            raise
        finally:
            self._forget(stream_id)
        if response.status.code:
            raise CallFailed(response.status)
        return response.payload

    def stream(
        self, service: str, method: str, *, metadata: Iterable[tuple[str, str]] = ()
    ) -> ClientStream:
        """Begin a call whose messages stream both ways.

        Raises:
            ConnectionError: as :meth:`call`.
        """
        request = request_pb2.Request(service=service, method=method, metadata=_pairs(metadata))
        inbox = Inbox(self._connection)
        stream_id = self._begin(request, REMOTE_OPEN)
        self._inboxes[stream_id] = inbox
        return ClientStream(self, stream_id, inbox, self._answers[stream_id])

    async def send(self, frame: Frame) -> None:
        """Send a frame of a stream.

        Raises:
            ConnectionError: the peer is gone.
            MessageTooLarge: it would not be taken.
        """
        if self._broken is not None:
            raise self._broken
        self._connection.send(frame.pack())
        await self._connection.drain()

    def end(self, stream_id: int) -> None:
        """Forget a stream; its peer is told to give it up if it still goes on."""
        answer = self._answers.get(stream_id)
        if answer is not None and not answer.done() and self._tells:
            self._connection.send(Frame(stream_id, CANCEL).pack())
        self._forget(stream_id)

    def _begin(self, request: request_pb2.Request, flags: int) -> int:
        if self._broken is not None:
            raise self._broken
        # Nothing is awaited here: stream ids grow in the order of the frames.
        packed = Frame(self._stream_id + 2, REQUEST, request.SerializeToString(), flags).pack()
        self._stream_id += 2
        self._answers[self._stream_id] = asyncio.get_running_loop().create_future()
        self._connection.send(packed)
        return self._stream_id

    def _forget(self, stream_id: int) -> None:
        answer = self._answers.pop(stream_id, None)
        self._inboxes.pop(stream_id, None)
        if answer is not None and answer.done() and not answer.cancelled():
            answer.exception()  # it may have come too late for anybody to ask

    def _take(self, frame: Frame) -> None:
        if frame.kind == DATA:
            inbox = self._inboxes.get(frame.stream_id)
            if inbox is not None:
                if not frame.flags & NO_DATA:
                    inbox.put(frame.payload)
                if frame.flags & REMOTE_CLOSED:
                    self._answer(frame.stream_id, request_pb2.Response())
        elif frame.kind == RESPONSE:
            try:
                response = request_pb2.Response.FromString(frame.payload)
            except DecodeError:
                self._break(ConnectionError("the peer's response cannot be decoded"))
                return
            self._answer(frame.stream_id, response)

    def _answer(self, stream_id: int, response: request_pb2.Response) -> None:
        answer = self._answers.get(stream_id)
        if answer is not None and not answer.done():  # else nobody waits for it any more
            answer.set_result(response)
        if (inbox := self._inboxes.get(stream_id)) is not None:
            inbox.end()

    def _too_large(self, error: MessageTooLarge) -> None:
        self._break(ConnectionError(str(error)))

    def _hung_up(self) -> None:
        self._break(ConnectionError("the peer hung up"))

    def _break(self, reason: ConnectionError) -> None:
        self._broken = self._broken or reason
        self._connection.close()
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(reason)
        for inbox in self._inboxes.values():
            inbox.end()


class Reconnecting:
    """A connection that is made when it is first used, and anew when it broke.

    Args:
        path: of the socket.
        tells: as a client's.
        client: one that is connected already.
    """

    def __init__(
        self, path: Path | str, *, tells: bool = False, client: TtrpcClient | None = None
    ) -> None:
        self._path = path
        self._tells = tells
        self._client = client
        self._connecting = asyncio.Lock()

    async def client(self) -> TtrpcClient:
        """The connection.

        Raises:
            OSError: nobody listens there.
        """
        if self._client is not None and not self._client.broken:
            return self._client
        async with self._connecting:
            if self._client is None or self._client.broken:
                self._client = await TtrpcClient.connect(self._path, tells=self._tells)
            return self._client

    def close(self) -> None:
        """Close the connection, if there is one. Idempotent."""
        if self._client is not None:
            self._client.close()


class ClientStream:
    """A call under way whose messages stream both ways."""

    def __init__(
        self,
        client: TtrpcClient,
        stream_id: int,
        inbox: Inbox,
        answer: asyncio.Future[request_pb2.Response],
    ) -> None:
        self._client = client
        self._stream_id = stream_id
        self._inbox = inbox
        self._answer = answer

    async def send(self, message: bytes) -> None:
        """Send a message; after the call's end nothing happens.

        Raises:
            ConnectionError: the peer is gone.
            MessageTooLarge: it would not be taken.
        """
        if not self._answer.done():
            await self._client.send(Frame(self._stream_id, DATA, message))

    async def end(self) -> None:
        """Send no more.

        Raises:
            ConnectionError: the peer is gone.
        """
        if not self._answer.done():
            await self._client.send(Frame(self._stream_id, DATA, b"", REMOTE_CLOSED | NO_DATA))

    async def receive(self) -> bytes | None:
        """The next message; None at the call's end.

        Raises:
            CallFailed: the peer refused, or ended the call with a failure.
            ConnectionError: it is gone.
        """
        message = await self._inbox.get()
        if message is None:
            response = await self._answer
            if response.status.code:
                raise CallFailed(response.status)
        return message

    def close(self) -> None:
        """Give the call up, if it still goes on. Idempotent."""
        self._client.end(self._stream_id)


def _pairs(metadata: Iterable[tuple[str, str]]) -> list[request_pb2.KeyValue]:
    return [request_pb2.KeyValue(key=key, value=value) for key, value in metadata]
