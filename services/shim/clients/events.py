"""From a shim's plain events to containerd's messages, packed as ``Any``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from google.protobuf import any_pb2, timestamp_pb2

from protos.containerd.events import task_pb2
from protos.containerd.types import mount_pb2
from protos.theseus.shim.v1 import registry_pb2
from services.shim import events

if TYPE_CHECKING:
    from collections.abc import Mapping

    from google.protobuf.message import Message

    from services.shim.events import Event

_MESSAGES: dict[str, type[Message]] = {
    events.TASK_START: task_pb2.TaskStart,
    events.TASK_OOM: task_pb2.TaskOOM,
    events.TASK_EXIT: task_pb2.TaskExit,
    events.TASK_LOST: registry_pb2.ProcessState,
    events.TASK_DELETE: task_pb2.TaskDelete,
    events.TASK_EXEC_ADDED: task_pb2.TaskExecAdded,
    events.TASK_EXEC_STARTED: task_pb2.TaskExecStarted,
    events.TASK_PAUSED: task_pb2.TaskPaused,
    events.TASK_RESUMED: task_pb2.TaskResumed,
    events.TASK_CHECKPOINTED: task_pb2.TaskCheckpointed,
}


def timestamp(time_ns: int) -> timestamp_pb2.Timestamp:
    """Nanoseconds since the epoch as a Timestamp."""
    seconds, nanos = divmod(time_ns, 1_000_000_000)
    return timestamp_pb2.Timestamp(seconds=seconds, nanos=nanos)


def pack(event: Event) -> any_pb2.Any:
    """The message of an event; fields that it does not have are left out."""
    message = _message(event)
    # containerd's type URLs have no prefix.
    return any_pb2.Any(
        type_url=message.DESCRIPTOR.full_name, value=message.SerializeToString(deterministic=True)
    )


def _message(event: Event) -> Message:
    if event.topic == events.TASK_CREATE:
        return _task_create(event.fields)
    kind = _MESSAGES[event.topic]
    values: dict[str, Any] = {}
    for name, value in event.fields.items():
        if name.endswith("_ns") and isinstance(value, int):
            if value:
                values[name.removesuffix("_ns")] = timestamp(value)
        elif name in kind.DESCRIPTOR.fields_by_name:
            values[name] = value
    return kind(**values)


def _task_create(fields: Mapping[str, Any]) -> task_pb2.TaskCreate:
    return task_pb2.TaskCreate(
        container_id=fields["container_id"],
        bundle=fields["bundle"],
        rootfs=[
            mount_pb2.Mount(
                type=mount["type"],
                source=mount["source"],
                target=mount["target"],
                options=mount["options"],
            )
            for mount in fields["rootfs"]
        ],
        io=task_pb2.TaskIO(
            stdin=fields["stdin"],
            stdout=fields["stdout"],
            stderr=fields["stderr"],
            terminal=fields["terminal"],
        ),
        pid=fields["pid"],
    )
