"""containerd's ttrpc event service, for shims that others wrote: they publish, and never register.

It listens beside the gRPC socket, at the same path with ``.ttrpc`` behind it, as upstream has it.
"""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING, Self, cast

from google.protobuf.empty_pb2 import Empty

from protos.containerd.services.ttrpc.events.v1 import events_pb2 as pb
from services.common.errors import InvalidArgument
from services.common.server import check_socket_path
from services.common.ttrpc.server import Method, TtrpcServer
from services.containerd.rpc.encoding import decode_event, nanoseconds
from services.containerd.tasks.journal import ShimEvent
from services.containerd.typed import TypedValue

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

    from google.protobuf.message import Message

    from services.containerd.events.exchange import Exchange
    from services.containerd.tasks.shims import ShimManager

SERVICE = "containerd.services.events.ttrpc.v1.Events"
_BACKLOG = 128


class ShimEventsServer:
    """Serves it; ``async with`` begins and ends that.

    Args:
        path: the socket.
        shims: whose events are theirs.
        exchange: takes all others.
    """

    def __init__(self, path: Path, shims: ShimManager, exchange: Exchange) -> None:
        self._path = path
        self._new = path.with_name(f"{path.name}.new")
        check_socket_path(self._new)
        self._shims = shims
        self._exchange = exchange
        self._inode = 0
        self._server = TtrpcServer({SERVICE: {"Forward": Method(pb.ForwardRequest, self.forward)}})

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

    async def forward(self, request: Message) -> Empty:
        """See the contract: an event goes into the journal before it is acknowledged."""
        envelope = cast("pb.ForwardRequest", request).envelope
        if not nanoseconds(envelope.timestamp):
            raise InvalidArgument("a forwarded event needs its timestamp", field="timestamp")
        message = TypedValue(envelope.event.type_url, envelope.event.value)
        event = ShimEvent(0, nanoseconds(envelope.timestamp), envelope.topic, message)
        container_id = getattr(decode_event(message), "container_id", "")
        if not await self._shims.forwarded(envelope.namespace, container_id, event):
            await self._exchange.publish(
                envelope.namespace, event.topic, message, timestamp_ns=event.timestamp_ns
            )
        return Empty()

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
