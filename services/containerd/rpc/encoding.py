"""Between our data and protobuf's: times, ``Any``, descriptors, and the messages of events."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from google.protobuf import descriptor_pool, message_factory
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import DecodeError, Message
from google.protobuf.timestamp_pb2 import Timestamp

from protos.containerd.events import (
    container_pb2,
    content_pb2,
    image_pb2,
    namespace_pb2,
    sandbox_pb2,
    snapshot_pb2,
    task_pb2,
)
from protos.containerd.types import descriptor_pb2
from services.common.errors import Internal
from services.containerd.content.descriptor import Descriptor
from services.containerd.typed import TypedValue

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

EVENT_FILES = (
    container_pb2,
    content_pb2,
    image_pb2,
    namespace_pb2,
    sandbox_pb2,
    snapshot_pb2,
    task_pb2,
)
"""Where the messages of events are defined; importing them makes them known by name."""


def timestamp(nanoseconds: int) -> Timestamp | None:
    """A time on the wire; None for 0, which is no time."""
    if not nanoseconds:
        return None
    message = Timestamp()
    message.FromNanoseconds(nanoseconds)
    return message


def nanoseconds(message: Timestamp) -> int:
    """A time off the wire."""
    return message.ToNanoseconds()


def to_any(value: TypedValue | None) -> AnyMessage | None:
    """A value as ``Any``, its type URL as it is."""
    return None if value is None else AnyMessage(type_url=value.type_url, value=value.value)


def from_any(message: AnyMessage) -> TypedValue | None:
    """What an ``Any`` carries; None if it is empty."""
    if not message.type_url and not message.value:
        return None
    return TypedValue(message.type_url, message.value)


def to_descriptor(descriptor: Descriptor) -> descriptor_pb2.Descriptor:
    """A descriptor on the wire."""
    return descriptor_pb2.Descriptor(
        media_type=descriptor.media_type,
        digest=descriptor.digest,
        size=descriptor.size_bytes,
        annotations=dict(descriptor.annotations),
    )


def from_descriptor(message: descriptor_pb2.Descriptor) -> Descriptor:
    """A descriptor off the wire."""
    return Descriptor(
        media_type=message.media_type,
        digest=message.digest,
        size_bytes=message.size,
        annotations=dict(message.annotations),
    )


def encode_event(type_name: str, fields: Mapping[str, object]) -> bytes:
    """The bytes of an event's message, as :class:`EventSink` describes its fields.

    Raises:
        Internal: there is no such message, or it has no such field.
    """
    message = _message(type_name)
    if message is None:
        raise Internal(f"there is no event message {type_name}")
    _fill(message, fields)
    return message.SerializeToString(deterministic=True)


def decode_event(event: TypedValue) -> Message | None:
    """The message of an event; None if its type is not known or its bytes are broken."""
    message = _message(event.type_url.rpartition("/")[2])
    if message is None:
        return None
    try:
        message.ParseFromString(event.value)
    except DecodeError:
        return None
    return message


def field_text(message: Message, path: Sequence[str]) -> str | None:
    """A field of a message as the filter language sees it: only text, and only if it is set."""
    field = message.DESCRIPTOR.fields_by_name.get(path[0]) if path else None
    if field is None:
        return None
    value = getattr(message, field.name)
    if field.message_type is None:
        return value or None if field.type == field.TYPE_STRING and not field.is_repeated else None
    if field.message_type.GetOptions().map_entry:
        found = value.get(".".join(path[1:]))
        return found if isinstance(found, str) else None
    if field.is_repeated or not message.HasField(field.name):
        return None
    if isinstance(value, AnyMessage):
        inner = decode_event(TypedValue(value.type_url, value.value))
        return None if inner is None else field_text(inner, path[1:])
    return field_text(value, path[1:])


def _message(type_name: str) -> Message | None:
    try:
        descriptor = descriptor_pool.Default().FindMessageTypeByName(type_name)
    except KeyError:
        return None
    message: Message = message_factory.GetMessageClass(descriptor)()
    return message


def _fill(message: Message, fields: Mapping[str, object]) -> None:
    for name, value in fields.items():
        field = message.DESCRIPTOR.fields_by_name.get(name)
        if field is None:
            raise Internal(f"event message {message.DESCRIPTOR.full_name} has no field {name!r}")
        if value is not None:
            _set(message, field, value)


def _set(message: Message, field: Any, value: Any) -> None:
    target = getattr(message, field.name)
    if field.message_type is None:
        if field.is_repeated:
            target.extend(value)
        else:
            setattr(message, field.name, value)
    elif field.message_type.GetOptions().map_entry:
        target.update(value)
    elif field.is_repeated:
        for item in value:
            _fill(target.add(), item)
    elif isinstance(target, Timestamp):
        target.FromNanoseconds(value)
    elif isinstance(target, AnyMessage):
        target.type_url, target.value = value.type_url, value.value
    else:
        target.SetInParent()
        _fill(target, value)
