"""containerd's socket for shims: ttrpc, beside the gRPC socket, with ``.ttrpc`` behind its path.

That is where upstream has it. Our shims register there, those that others wrote publish events.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Self

from protos.theseus.shim.v1 import registry_pb2_grpc
from services.common.server import Methods
from services.common.sockets import Place, check_socket_path, listen
from services.common.ttrpc.server import TtrpcServer
from services.common.ttrpc_handlers import Handlers
from services.containerd.rpc.registry import RegistryService
from services.containerd.rpc.shim_events import ShimEventsService, add_shim_events_to_server

if TYPE_CHECKING:
    import socket
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
        self._place = Place(address.with_name(f"{address.name}.ttrpc"))
        check_socket_path(self._place.new)
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
        await asyncio.to_thread(self._place.leave)

    def _bind(self) -> socket.socket:
        listener = listen(self._place.new, mode=0o600, backlog=_BACKLOG)
        try:
            self._place.take()
        except BaseException:
            listener.close()
            raise
        return listener
