"""containerd's ttrpc event service, for shims that others wrote: they publish, and never register.

It listens beside the gRPC socket, at the same path with ``.ttrpc`` behind it, as upstream has it.
What shims publish there, or over gRPC by a program of theirs, is journaled as the shim's.
"""

from __future__ import annotations

import asyncio
import socket
import time
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


class ShimEvents:
    """Publishes events, and knows those that shims publish about their tasks.

    Args:
        shims: whose events are theirs.
        exchange: takes all others.
    """

    def __init__(self, shims: ShimManager, exchange: Exchange) -> None:
        self._shims = shims
        self._exchange = exchange

    async def publish(
        self, namespace: str, topic: str, event: TypedValue, *, timestamp_ns: int | None = None
    ) -> None:
        """As ``Exchange.publish``."""
        if topic.startswith("/tasks/"):
            told = ShimEvent(0, timestamp_ns or time.time_ns(), topic, event)
            container_id = getattr(decode_event(event), "container_id", "")
            if await self._shims.forwarded(namespace, container_id, told):
                return
        await self._exchange.publish(namespace, topic, event, timestamp_ns=timestamp_ns)


class ShimEventsServer:
    """Serves it; ``async with`` begins and ends that.

    Args:
        path: the socket.
        events: takes them.
    """

    def __init__(self, path: Path, events: ShimEvents) -> None:
        self._path = path
        self._new = path.with_name(f"{path.name}.new")
        check_socket_path(self._new)
        self._events = events
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
        await self._events.publish(
            envelope.namespace,
            envelope.topic,
            TypedValue(envelope.event.type_url, envelope.event.value),
            timestamp_ns=nanoseconds(envelope.timestamp),
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
