"""A shim's server: ttrpc for containerd, and gRPC from the first client on that speaks it.

Both on one listening socket, of which this process, and every image of it, has the descriptor. What
a connection speaks is known by its first byte. gRPC costs a process two megabytes, eight threads
and some milliseconds, and is needed by people and their tools alone: see ``on_demand.py``.

A shim that waits to be told which one it is listens already, elsewhere. Calls that come before it
is told wait for that: containerd need not.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from services.common import sockets
from services.common.errors import FailedPrecondition
from services.common.frozen import frozen
from services.common.server import Methods
from services.common.sockets import Place, check_socket_path, let_group_in
from services.common.ttrpc.server import TtrpcServer
from services.common.ttrpc_handlers import Handlers
from services.shim.rpc.on_demand import GrpcOnDemand

if TYPE_CHECKING:
    import socket
    from collections.abc import Sequence
    from pathlib import Path

    import grpc

    from protos.containerd.ttrpc import request_pb2
    from services.common.server import CallMetrics, Service
    from services.common.ttrpc.server import Call

_BACKLOG = 128


class ShimServer:
    """Serves ``services`` on a shim's socket.

    Args:
        services: of both protocols; gRPC has health and reflection besides.
        metrics: counts calls.
        interceptors: see a call after the common one.
    """

    def __init__(
        self,
        *,
        services: Sequence[Service],
        metrics: CallMetrics,
        interceptors: Sequence[grpc.aio.ServerInterceptor],
    ) -> None:
        self._place: Place | None = None
        self._bound: Listener | None = None
        self._opened = asyncio.Event()
        methods = Methods(metrics)
        for service in services:
            methods.add_when_called(service)
        self._handlers = Handlers(methods, interceptors)
        self._grpc = GrpcOnDemand(services=services, metrics=metrics, interceptors=interceptors)
        self._server = TtrpcServer(self._answer, stranger=self._meet)

    @property
    def listener(self) -> int:
        """Descriptor of the listening socket; -1 before ``listen``."""
        return self._bound.socket.fileno() if self._bound is not None else -1

    @property
    def speaks_grpc(self) -> bool:
        """Whether gRPC was started in this process."""
        return self._grpc.started

    async def listen(self, listener: Listener) -> None:
        """Take connections; their calls wait for :meth:`open`."""
        self._bound = listener
        if listener.at is not None:
            let_group_in(listener.at)
        await self._server.start(listener.socket)

    async def prepare(self, service: str, method: str) -> None:
        """Have a method ready that is about to be called."""
        await self._handlers.find(service, method)

    def open(self, path: Path) -> None:
        """Move the socket to ``path``, and let the calls in.

        Raises:
            InvalidArgument: the path is longer than a socket's name may be.
            FailedPrecondition: there can be no socket in that place.
        """
        assert self._bound is not None, "it listens"
        place = Place(path)
        check_socket_path(place.new)
        try:
            if self._bound.at is None:
                place.recognise()
            else:
                place.take(self._bound.at)
        except OSError as error:
            raise FailedPrecondition(
                f"the socket cannot be put at {path}: {error.strerror}"
            ) from error
        self._place = place
        self._opened.set()

    async def start(self, path: Path, listener: Listener | None = None) -> None:
        """Serve at ``path``; ``listener`` is one that is there already.

        Raises:
            As :meth:`open`, and :func:`listen`.
        """
        check_socket_path(Place(path).new)
        await self.listen(listener or listen(Place(path).new))
        self.open(path)

    async def stop(self, grace_s: float) -> None:
        """Take no more calls; those under way get ``grace_s`` seconds to finish."""
        await self._server.stop(grace_s)
        await self._grpc.stop(grace_s)
        if self._place is not None:
            self._place.leave()

    async def _answer(self, call: Call) -> request_pb2.Response:
        if self._place is None:
            await self._opened.wait()
        return await self._handlers.answer(call)

    def _meet(self, transport: asyncio.Transport, data: bytes) -> None:
        if self._place is None:  # nobody has business with it but containerd
            transport.close()
        else:
            self._grpc.take(transport, data, self._place.path.parent)


@frozen
class Listener:
    """A socket that listens.

    Attributes:
        socket: it.
        at: where it waits to be put in its place; None: it is there.
    """

    socket: socket.socket
    at: Path | None = None


def listen(path: Path) -> Listener:
    """A socket that listens at ``path``, mode 0660.

    Raises:
        InvalidArgument: the path is longer than a socket's name may be.
        FailedPrecondition: there can be no socket in that directory.
    """
    check_socket_path(path)
    try:
        return Listener(sockets.listen(path, mode=0o660, backlog=_BACKLOG), path)
    except OSError as error:
        raise FailedPrecondition(f"cannot bind the socket {path}: {error.strerror}") from error
