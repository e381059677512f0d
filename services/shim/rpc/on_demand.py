"""gRPC in a process that starts it only when somebody speaks it.

grpc.aio serves no connection that it has not accepted itself. Its server therefore listens on a
socket of its own, whose name is gone before anybody could use it, and the bytes of a connection are
passed on to it through the descriptor.
"""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, cast

import structlog

from services.common.background import Background
from services.common.server import RpcServer
from services.shim.config import waiting_name

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import grpc

    from services.common.server import CallMetrics, Service

log = structlog.get_logger(__name__)

_START_S = 10.0


class GrpcOnDemand:
    """A gRPC server for the connections that it is given.

    Args:
        services: what it serves.
        metrics: counts calls.
        interceptors: as a server's.

    Attributes:
        started: whether gRPC was, whatever came of it.
    """

    def __init__(
        self,
        *,
        services: Sequence[Service],
        metrics: CallMetrics,
        interceptors: Sequence[grpc.aio.ServerInterceptor],
    ) -> None:
        self._services = services
        self._metrics = metrics
        self._interceptors = interceptors
        self._starting = asyncio.Lock()
        self._server: RpcServer | None = None
        self._socket = -1
        self.started = False
        self._background = Background()
        self._relays: set[_Relay] = set()

    def take(self, transport: asyncio.Transport, data: bytes, directory: Path) -> None:
        """Serve a connection, which has sent ``data`` so far.

        The server's socket is bound in ``directory`` under the name that a waiting shim's has: one
        that a process left which died between two steps goes with theirs.
        """
        transport.pause_reading()
        path = directory / waiting_name()
        self._background.start(self._join(transport, data, path), name="gRPC connection")

    async def stop(self, grace_s: float) -> None:
        """End everything; calls under way get ``grace_s`` seconds to finish."""
        await self._background.stop()
        if self._server is not None:
            await self._server.stop(grace_s)
            os.close(self._socket)
            self._server, self._socket = None, -1
        for relay in list(self._relays):
            relay.hang_up()

    async def _join(self, transport: asyncio.Transport, data: bytes, path: Path) -> None:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(_START_S):
                await self._start(path)
                outer, inner = _Relay(self._relays), _Relay(self._relays)
                await loop.create_unix_connection(lambda: inner, f"/proc/self/fd/{self._socket}")
        except BaseException as error:
            transport.abort()
            if not isinstance(error, Exception):
                raise
            log.error("gRPC cannot be served", exc_info=error)
            return
        outer.connect(inner)
        inner.connect(outer)
        inner.write(data)
        transport.set_protocol(outer)
        outer.connection_made(transport)
        transport.resume_reading()

    async def _start(self, path: Path) -> None:
        async with self._starting:
            if self._server is not None:
                return
            self.started = True
            server = RpcServer(
                tier="shim",
                socket=path,
                services=self._services,
                metrics=self._metrics,
                interceptors=self._interceptors,
            )
            await server.start()
            self._socket = os.open(path, os.O_PATH | os.O_CLOEXEC)
            os.unlink(path)  # noqa: PTH108 - a name in memory
            self._server = server
            log.info("gRPC started")


class _Relay(asyncio.Protocol):
    """One end of a connection that is passed on: what it reads its peer writes."""

    def __init__(self, relays: set[_Relay]) -> None:
        self._relays = relays
        self._transport: asyncio.Transport | None = None
        self._peer: _Relay | None = None

    def connect(self, peer: _Relay) -> None:
        self._peer = peer

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._relays.add(self)

    def data_received(self, data: bytes) -> None:
        if self._peer is not None:
            self._peer.write(data)

    def write(self, data: bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    def pause_writing(self) -> None:
        if self._peer is not None and self._peer._transport is not None:
            self._peer._transport.pause_reading()

    def resume_writing(self) -> None:
        if self._peer is not None and self._peer._transport is not None:
            self._peer._transport.resume_reading()

    def connection_lost(self, error: Exception | None) -> None:
        del error
        self._relays.discard(self)
        if self._peer is not None:
            self._peer.hang_up()

    def hang_up(self) -> None:
        """Close, once what is on its way has gone."""
        if self._transport is not None:
            self._transport.close()
