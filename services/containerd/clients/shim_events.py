"""Messages of shims' events: implements :class:`services.containerd.tasks.journal.EventCodec`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from google.protobuf.message import DecodeError

from protos.containerd.events import task_pb2
from protos.theseus.shim.v1 import registry_pb2
from services.containerd.rpc.encoding import nanoseconds, timestamp
from services.containerd.tasks.journal import ExitNotice, ShimEvent
from services.containerd.tasks.shim import ProcessExit
from services.containerd.typed import TypedValue

if TYPE_CHECKING:
    from collections.abc import Mapping

    from google.protobuf.message import Message

    from services.containerd.tasks.journal import ShimNotice

_STREAMS = tuple(task_pb2.TaskIO.DESCRIPTOR.fields_by_name)
_LOST = registry_pb2.ProcessState.DESCRIPTOR.full_name
_MESSAGES: Mapping[str, type[Message]] = {
    "/tasks/create": task_pb2.TaskCreate,
    "/tasks/start": task_pb2.TaskStart,
    "/tasks/delete": task_pb2.TaskDelete,
    "/tasks/exit": task_pb2.TaskExit,
    "/tasks/lost": registry_pb2.ProcessState,
    "/tasks/oom": task_pb2.TaskOOM,
    "/tasks/exec-added": task_pb2.TaskExecAdded,
    "/tasks/exec-started": task_pb2.TaskExecStarted,
    "/tasks/paused": task_pb2.TaskPaused,
    "/tasks/resumed": task_pb2.TaskResumed,
    "/tasks/checkpointed": task_pb2.TaskCheckpointed,
}


class ShimEventCodec:
    """Reads and makes the messages."""

    def decode_exit(self, event: TypedValue) -> ExitNotice | None:
        """As ``EventCodec.decode_exit``."""
        try:
            if event.type_url.endswith(_LOST):
                state = registry_pb2.ProcessState.FromString(event.value)
                return ExitNotice(state.container_id, state.exec_id, None)
            message = task_pb2.TaskExit.FromString(event.value)
        except DecodeError:
            return None
        end = ProcessExit(message.exit_status, nanoseconds(message.exited_at), message.pid)
        exec_id = "" if message.id in ("", message.container_id) else message.id
        return ExitNotice(message.container_id, exec_id, end)

    def decode_exec_added(self, event: TypedValue) -> str:
        """As ``EventCodec.decode_exec_added``."""
        try:
            return task_pb2.TaskExecAdded.FromString(event.value).exec_id
        except DecodeError:
            return ""

    def encode_exit(self, notice: ExitNotice) -> TypedValue:
        """As ``EventCodec.encode_exit``."""
        if notice.exit is None:
            return _typed(_process_state(notice))
        return _typed(
            task_pb2.TaskExit(
                container_id=notice.container_id,
                id=notice.exec_id or notice.container_id,
                pid=notice.exit.pid,
                exit_status=notice.exit.exit_status,
                exited_at=timestamp(notice.exit.exited_at_ns),
            )
        )

    def encode_delete(self, container_id: str, exit: ProcessExit) -> TypedValue:
        """As ``EventCodec.encode_delete``."""
        return _typed(
            task_pb2.TaskDelete(
                container_id=container_id,
                pid=exit.pid,
                exit_status=exit.exit_status,
                exited_at=timestamp(exit.exited_at_ns),
            )
        )

    def encode_shim(self, notice: ShimNotice) -> TypedValue:
        """As ``EventCodec.encode_shim``."""
        return _typed(
            registry_pb2.Hello(
                namespace=notice.namespace,
                id=notice.id,
                instance_id=notice.instance_id,
                pid=notice.pid,
                pid_start_time=notice.start_time,
                bundle=notice.bundle,
                processes=[_process_state(end) for end in notice.exits],
            )
        )

    def decode_spooled(self, data: bytes) -> ShimEvent | None:
        """As ``EventCodec.decode_spooled``: a JSON object with seq, timestamp_ns, topic, fields."""
        try:
            spooled = json.loads(data)
            message = _MESSAGES[spooled["topic"]]()
            _fill(message, spooled["fields"])
            return ShimEvent(
                int(spooled["seq"]),
                int(spooled["timestamp_ns"]),
                str(spooled["topic"]),
                _typed(message),
            )
        except (ValueError, KeyError, TypeError, AttributeError):
            return None


def _process_state(notice: ExitNotice) -> registry_pb2.ProcessState:
    return registry_pb2.ProcessState(
        container_id=notice.container_id,
        exec_id=notice.exec_id,
        pid=notice.exit.pid if notice.exit is not None else 0,
        status="stopped",
        exit_status=notice.exit.exit_status if notice.exit is not None else 0,
        exited_at=timestamp(notice.exit.exited_at_ns) if notice.exit is not None else None,
        exit_status_lost=notice.exit is None,
    )


def _typed(message: Message) -> TypedValue:
    name = message.DESCRIPTOR.full_name
    return TypedValue(name, message.SerializeToString(deterministic=True))


def _fill(message: Message, fields: Mapping[str, Any]) -> None:
    """Set the fields that the message has; what it has no field for stays behind."""
    for name, value in fields.items():
        field = message.DESCRIPTOR.fields_by_name.get(name)
        time = message.DESCRIPTOR.fields_by_name.get(name.removesuffix("_ns"))
        if field is None and time is not None and time.message_type is not None:
            if value:
                getattr(message, time.name).FromNanoseconds(int(value))
        elif field is None and name in _STREAMS and "io" in message.DESCRIPTOR.fields_by_name:
            _fill(message.io, {name: value})  # type: ignore[attr-defined]  # the line above looked
        elif field is None or value is None:
            continue
        elif field.message_type is None and not field.is_repeated:
            setattr(message, name, value)
        elif field.message_type is None:
            getattr(message, name).extend(value)
        elif field.is_repeated:
            for item in value:
                _fill(getattr(message, name).add(), item)
        else:
            getattr(message, name).SetInParent()
            _fill(getattr(message, name), value)
