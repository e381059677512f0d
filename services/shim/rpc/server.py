"""A shim's server: ttrpc for containerd, and gRPC from the first client on that speaks it.

Both on one listening socket, of which this process, and every image of it, has the descriptor. What
a connection speaks is known by its first byte. gRPC costs a process two megabytes, eight threads
and some milliseconds, and is needed by people and their tools alone: see ``on_demand.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from services.common import sockets
from services.common.errors import FailedPrecondition
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

    from services.common.server import CallMetrics, Service

_BACKLOG = 128


class ShimServer:
    """Serves ``services`` on a shim's socket.

    Args:
        path: of the socket.
        services: of both protocols; gRPC has health and reflection besides.
        metrics: counts calls.
        interceptors: see a call after the common one.

    Raises:
        InvalidArgument: the path is longer than a socket's name may be.
    """

    def __init__(
        self,
        path: Path,
        *,
        services: Sequence[Service],
        metrics: CallMetrics,
        interceptors: Sequence[grpc.aio.ServerInterceptor],
    ) -> None:
        self._place = Place(path)
        self._listener: socket.socket | None = None
        methods = Methods(metrics)
        for service in services:
            methods.add_when_called(service)
        self._grpc = GrpcOnDemand(
            path.parent, services=services, metrics=metrics, interceptors=interceptors
        )
        self._server = TtrpcServer(Handlers(methods, interceptors).answer, stranger=self._grpc.take)

    @property
    def listener(self) -> int:
        """Descriptor of the listening socket; -1 before ``start``."""
        return self._listener.fileno() if self._listener is not None else -1

    async def start(self, listener: Listener | None = None) -> None:
        """Serve; ``listener`` is one that is there already.

        Raises:
            FailedPrecondition: there can be no socket in that place.
        """
        listener = listener or listen(self._place.new)
        self._listener = listener.socket
        try:
            if listener.at is None:
                self._place.recognise()
            else:
                let_group_in(listener.at)
                self._place.take(listener.at)
        except OSError as error:
            raise FailedPrecondition(
                f"the socket cannot be put at {self._place.path}: {error.strerror}"
            ) from error
        await self._server.start(listener.socket)

    async def stop(self, grace_s: float) -> None:
        """Take no more calls; those under way get ``grace_s`` seconds to finish."""
        await self._server.stop(grace_s)
        await self._grpc.stop(grace_s)
        self._place.leave()


@dataclass(frozen=True, slots=True)
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
