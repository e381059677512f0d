"""containerd's ttrpc event service, for shims that others wrote: they publish, and never register.

What they publish there, or over gRPC by a program of theirs, is journaled as the shim's.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.empty_pb2 import Empty

from protos.containerd.services.ttrpc.events.v1 import events_pb2 as pb
from services.common.errors import InvalidArgument
from services.containerd.rpc.encoding import decode_event, nanoseconds
from services.containerd.tasks.journal import ShimEvent
from services.containerd.typed import TypedValue

if TYPE_CHECKING:
    from services.containerd.events.exchange import Exchange
    from services.containerd.rpc.context import Context
    from services.containerd.tasks.shims import ShimManager

SERVICE = "containerd.services.events.ttrpc.v1.Events"


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


class ShimEventsService:
    """Serves it.

    Args:
        events: takes them.
    """

    def __init__(self, events: ShimEvents) -> None:
        self._events = events

    async def Forward(self, request: pb.ForwardRequest, context: Context) -> Empty:
        """See the contract: an event goes into the journal before it is acknowledged."""
        envelope = request.envelope
        if not nanoseconds(envelope.timestamp):
            raise InvalidArgument("a forwarded event needs its timestamp", field="timestamp")
        await self._events.publish(
            envelope.namespace,
            envelope.topic,
            TypedValue(envelope.event.type_url, envelope.event.value),
            timestamp_ns=nanoseconds(envelope.timestamp),
        )
        return Empty()


def add_shim_events_to_server(servicer: ShimEventsService, server: Any) -> None:
    """As a generated ``add_EventsServicer_to_server``, which ttrpc's contract has none of."""
    handler: Any = grpc.unary_unary_rpc_method_handler(
        servicer.Forward,
        request_deserializer=pb.ForwardRequest.FromString,
        response_serializer=Empty.SerializeToString,
    )
    server.add_registered_method_handlers(SERVICE, {"Forward": handler})
