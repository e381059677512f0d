"""A shim that waits ready: its loop runs and its server listens before it is told whose it is.

Half of the time in which a shim comes up goes by before anything depends on its container: the
fork, the event loop, gRPC's threads and server. A prepared shim has that behind it, waits on the
connection that it was asked for on, and becomes an ordinary shim when a request comes. It ends when
the connection is closed, which the kernel does for a containerd that dies.

Its server is bound as ``waiting-<pid>`` in a directory of its own, and gets its place by a rename,
as the socket of a new server always does. Services and interceptors are known only then, so the
server looks them up at each call; a call before that finds none.
"""

from __future__ import annotations

from contextlib import suppress
from contextvars import copy_context
from typing import TYPE_CHECKING, Any

import grpc

from services.common.errors import FailedPrecondition
from services.common.server import SERVER_OPTIONS, check_socket_path
from services.shim.config import waiting_name

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path


class PreparedServer(grpc.GenericRpcHandler):
    """A gRPC server that runs already; ``make`` gives it to whoever would make one.

    Args:
        directory: on the file system of the sockets of shims.

    Raises:
        InvalidArgument: its path is longer than a socket's name may be.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / waiting_name()
        check_socket_path(self._path)
        self._server: grpc.aio.Server | None = None
        self._handlers: list[grpc.GenericRpcHandler] = []
        self._interceptors: Sequence[grpc.aio.ServerInterceptor] = ()
        self._context = copy_context()

    async def listen(self) -> None:
        """Bind and start.

        Raises:
            FailedPrecondition: there can be no socket in that directory.
        """
        self._server = grpc.aio.server(interceptors=[_Late(self)], options=SERVER_OPTIONS)
        self._server.add_generic_rpc_handlers((self,))
        self._path.unlink(missing_ok=True)  # of an earlier process with this pid
        if self._server.add_insecure_port(f"unix:{self._path}") == 0:
            raise FailedPrecondition(f"cannot bind the socket {self._path}: see the log above")
        await self._server.start()

    async def discard(self) -> None:
        """End a server that nobody wanted; one that has its place is left alone."""
        if self._server is not None and self._path.exists():
            await self._server.stop(0)
            self._path.unlink(missing_ok=True)

    def make(
        self, *, interceptors: Sequence[grpc.aio.ServerInterceptor], options: object
    ) -> PreparedServer:
        """As ``grpc.aio.server``; the options are those that it has."""
        del options
        self._interceptors = interceptors
        self._context = copy_context()
        return self

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """As a server's."""
        self._handlers += handlers

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        """As a server's; generated code adds the same methods as generic handlers."""

    def add_insecure_port(self, address: str) -> int:
        """Move the socket to ``address``; as a server's, 0 where that cannot be done."""
        with suppress(OSError):
            self._path.rename(address.removeprefix("unix:"))
            return 1
        return 0

    async def start(self) -> None:
        """It was started."""

    async def stop(self, grace_s: float) -> None:
        """As a server's."""
        if self._server is not None:
            await self._server.stop(grace_s)

    def service(
        self, handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """The handler of a method, once there is one."""
        for handler in self._handlers:
            found = handler.service(handler_call_details)
            if found is not None:
                return found
        return None

    async def intercept(self, number: int, details: Any, last: Any) -> Any:
        """Ask the interceptors from ``number`` on, and then ``last``, for the handler of a call."""
        if number == 0:  # calls begin in the context in which the server was started
            for variable, value in self._context.items():
                variable.set(value)
        if number == len(self._interceptors):
            return await last(details)

        async def following(again: Any) -> Any:
            return await self.intercept(number + 1, again, last)

        return await self._interceptors[number].intercept_service(following, details)


class _Late(grpc.aio.ServerInterceptor):
    """Stands for the interceptors that the server will have."""

    def __init__(self, server: PreparedServer) -> None:
        self._server = server

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        return await self._server.intercept(0, handler_call_details, continuation)
