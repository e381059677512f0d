"""A service of ours on a Unix socket, called by ttrpc, or by gRPC where it is of an older version.

All unary calls share a connection, which is made when first used, and anew when it broke; a stream
has one of its own, so that one whose reader is slow holds up nobody. A peer that speaks only gRPC
is known by its first bytes, and hangs up without having done anything: the next attempt goes that
way, and the one after a failure there by ttrpc again.

What fails with UNAVAILABLE is tried again, as on our gRPC channels (``services.common.client``).
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import grpc

from services.common import tracing
from services.common.client import NAMESPACE_KEY, connect
from services.common.errors import (
    DeadlineExceeded,
    InvalidArgument,
    TheseusError,
    Unavailable,
)
from services.common.peer_streams import GrpcStream, TtrpcStream
from services.common.request import REQUEST_ID_KEY, new_request_id, request_id
from services.common.rpc_errors import error_of, translated
from services.common.ttrpc.client import CallFailed, Reconnecting, TtrpcClient
from services.common.ttrpc.frames import MessageTooLarge

if TYPE_CHECKING:
    from pathlib import Path

    from services.common.message_stream import MessageStream

    Pairs = tuple[tuple[str, str], ...]

_PAUSES_S = (0.03, 0.06, 0.12, 0.25)


class Peer:
    """A service on a socket; see the module.

    Args:
        socket: its path, or ``unix://`` and its path.
        namespace: containerd's, which every call carries.
        connection: one that there is already, which becomes the peer's.
    """

    def __init__(
        self,
        socket: Path | str,
        *,
        namespace: str = "",
        connection: TtrpcClient | None = None,
    ) -> None:
        self._path = str(socket).removeprefix("unix://")
        self._namespace = namespace
        self._connection = Reconnecting(self._path, tells=True, client=connection)
        self._older: grpc.aio.Channel | None = None
        self._speaks_grpc = False
        self._closed = False

    async def call(self, method: str, request: bytes, *, timeout_s: float) -> bytes:
        """Make a unary call: full name of the service, slash, name.

        Raises:
            TheseusError: what the peer refused with.
            DeadlineExceeded: it did not answer in time.
            Unavailable: it is not there.
        """
        metadata, done = self._metadata(method)
        try:
            async with asyncio.timeout(timeout_s):
                for pause_s in _PAUSES_S:
                    try:
                        return await self._attempt(method, request, timeout_s, metadata)
                    except Unavailable:
                        if self._closed:
                            raise
                    await asyncio.sleep(pause_s)
                return await self._attempt(method, request, timeout_s, metadata)
        except TimeoutError:
            raise DeadlineExceeded(
                f"{self._path} did not answer {method} within {timeout_s:g} s"
            ) from None
        finally:
            if done is not None:
                done(None)

    async def stream(self, method: str) -> MessageStream:
        """Begin a call whose messages stream both ways; the caller closes it.

        Raises:
            Unavailable: the peer is not there.
        """
        metadata, done = self._metadata(method)
        if done is not None:
            done(None)  # the span of a stream is that of its server
        if self._closed:
            raise self._gone("the connection was closed")
        if self._speaks_grpc:
            call: Any = self._channel().stream_stream(f"/{method}")  # no serializers: bytes
            return GrpcStream(call(metadata=metadata), self._lost_older)
        service, _, name = method.partition("/")
        client = None
        try:
            client = await TtrpcClient.connect(self._path, tells=True)
            stream = client.stream(service, name, metadata=metadata)
        except OSError as error:
            if client is not None:
                client.close()
            raise self._gone(str(error)) from None
        return TtrpcStream(client, stream, lambda: self._lost(client))

    async def close(self) -> None:
        """Let go; unary calls under way fail with Unavailable. Idempotent."""
        self._closed = True
        self._connection.close()
        if self._older is not None:
            await self._older.close()

    async def _attempt(
        self, method: str, request: bytes, timeout_s: float, metadata: Pairs
    ) -> bytes:
        if self._closed:
            raise self._gone("the connection was closed")
        if self._speaks_grpc:
            return await self._by_grpc(method, request, timeout_s, metadata)
        service, _, name = method.partition("/")
        client = None
        try:
            client = await self._connection.client()
            return await client.call(service, name, request, timeout_s=timeout_s, metadata=metadata)
        except CallFailed as error:
            raise error_of(error.status) from None
        except MessageTooLarge as error:
            raise InvalidArgument(str(error)) from None
        except OSError as error:
            if client is not None:
                self._lost(client)
            raise self._gone(str(error)) from None

    async def _by_grpc(
        self, method: str, request: bytes, timeout_s: float, metadata: Pairs
    ) -> bytes:
        call: Any = self._channel().unary_unary(f"/{method}")
        try:
            with translated():
                answer: bytes = await call(request, timeout=timeout_s, metadata=metadata)
                return answer
        except grpc.aio.UsageError as error:  # the channel was closed while the call began
            raise self._gone(str(error)) from None
        except Unavailable:
            self._lost_older()
            raise
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not self._closed or (task is not None and task.cancelling()):
                raise
            raise self._gone("the connection was closed") from None  # which cancelled the call
        except TheseusError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                # The call's end came first; our caller has to see the other.
                raise asyncio.CancelledError from None
            raise

    def _channel(self) -> grpc.aio.Channel:
        if self._older is None:
            self._older = connect(self._path)
        return self._older

    def _lost(self, client: TtrpcClient) -> None:
        self._speaks_grpc = client.alien

    def _lost_older(self) -> None:
        self._speaks_grpc = False

    def _metadata(self, method: str) -> tuple[Pairs, Any]:
        metadata = grpc.aio.Metadata((REQUEST_ID_KEY, request_id.get() or new_request_id()))
        if self._namespace:
            metadata.add(NAMESPACE_KEY, self._namespace)
        done = tracing.calling(f"/{method}", metadata)
        return tuple((key, str(value)) for key, value in metadata), done

    def _gone(self, reason: str) -> Unavailable:
        return Unavailable(f"{self._path} cannot be reached: {reason}")
