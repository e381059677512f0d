"""containerd's socket for shims: ttrpc, beside the gRPC socket, with ``.ttrpc`` behind its path.

That is where upstream has it. Our shims register there, those that others wrote publish events.
"""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING, Any, Self

from protos.theseus.shim.v1 import registry_pb2_grpc
from services.common.server import Methods, check_socket_path
from services.common.ttrpc.server import TtrpcServer
from services.common.ttrpc_handlers import Handlers
from services.containerd.rpc.registry import RegistryService
from services.containerd.rpc.shim_events import ShimEventsService, add_shim_events_to_server

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

    from services.common.server import CallMetrics
    from services.containerd.rpc.shim_events import ShimEvents
    from services.containerd.tasks.shims import ShimManager

_BACKLOG = 4096  # after a restart all shims come at once


class ShimSocket:
    """Serves it; ``async with`` begins and ends that.

    Args:
        address: containerd's gRPC socket.
        shims: the register.
        events: takes those of others.
        metrics: counts calls.
    """

    def __init__(
        self, address: Path, *, shims: ShimManager, events: ShimEvents, metrics: CallMetrics
    ) -> None:
        self._path = address.with_name(f"{address.name}.ttrpc")
        self._new = address.with_name(f"{address.name}.ttrpc.new")
        check_socket_path(self._new)
        self._inode = 0
        methods: Any = Methods(metrics)
        registry_pb2_grpc.add_RegistryServicer_to_server(RegistryService(shims), methods)
        add_shim_events_to_server(ShimEventsService(events), methods)
        self._server = TtrpcServer(Handlers(methods).answer)

    async def __aenter__(self) -> Self:
        await self._server.start(await asyncio.to_thread(self._bind))
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._server.stop()
        await asyncio.to_thread(self._unbind)

    def _bind(self) -> socket.socket:
        """A listening socket in its place, by a rename: there always is one to connect to."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._new.unlink(missing_ok=True)
            listener.bind(str(self._new))
            self._new.chmod(0o600)
            listener.listen(_BACKLOG)
            self._inode = self._new.stat().st_ino
            self._new.rename(self._path)
        except BaseException:
            listener.close()
            raise
        listener.setblocking(False)
        return listener

    def _unbind(self) -> None:
        # A successor may have put its own socket in this place.
        if self._path.exists() and self._path.stat().st_ino == self._inode:
            self._path.unlink()
