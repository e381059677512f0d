"""``containerd.services.events.v1.Events``: publishing and subscribing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from google.protobuf.empty_pb2 import Empty

from protos.containerd.services.events.v1 import events_pb2 as pb
from protos.containerd.services.events.v1 import events_pb2_grpc
from protos.containerd.types import event_pb2
from services.common.errors import InvalidArgument
from services.common.server import request_namespace
from services.containerd.rpc.encoding import (
    decode_event,
    field_text,
    nanoseconds,
    timestamp,
    to_any,
)
from services.containerd.typed import TypedValue

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from services.containerd.events.exchange import Exchange
    from services.containerd.rpc.context import Context
    from services.containerd.rpc.shim_events import ShimEvents


class EventsService(events_pb2_grpc.EventsServicer):
    """Serves an exchange.

    Args:
        exchange: gives events out.
        events: takes them in.
    """

    def __init__(self, exchange: Exchange, events: ShimEvents | Exchange) -> None:
        self._exchange = exchange
        self._events = events

    async def Publish(self, request: pb.PublishRequest, context: Context) -> Empty:
        """See the contract."""
        event = TypedValue(request.event.type_url, request.event.value)
        await self._events.publish(request_namespace(context), request.topic, event)
        return Empty()

    async def Forward(self, request: pb.ForwardRequest, context: Context) -> Empty:
        """See the contract."""
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

    async def Subscribe(
        self, request: pb.SubscribeRequest, context: Context
    ) -> AsyncIterator[event_pb2.Envelope]:
        """See the contract."""
        async for entry in self._exchange.subscribe(request.filters):
            yield event_pb2.Envelope(
                timestamp=timestamp(entry.timestamp_ns),
                namespace=entry.namespace,
                topic=entry.topic,
                event=to_any(entry.event),
            )


def event_field(event: TypedValue, path: Sequence[str]) -> str | None:
    """A field of an event's message, for filters; None if it is not there."""
    message = decode_event(event)
    return None if message is None else field_text(message, path)
