"""containerd's event journal."""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc
from google.protobuf.message import DecodeError

from protos.containerd.events import task_pb2
from protos.theseus.journal.v1 import journal_pb2 as pb
from protos.theseus.journal.v1 import journal_pb2_grpc
from protos.theseus.shim.v1 import registry_pb2
from services.common.errors import Unavailable
from services.daemon.clients.connection import TIMEOUT_S
from services.daemon.containers.runtime import EventKind, RuntimeEvent

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from services.daemon.clients.connection import Connection

_CATCH_UP_TIMEOUT_S = 300.0
_TOPIC_EXIT = "/tasks/exit"
_TOPIC_LOST = "/tasks/lost"
_PLAIN: dict[
    str,
    tuple[EventKind, type[task_pb2.TaskOOM | task_pb2.TaskPaused | task_pb2.TaskResumed]],
] = {
    "/tasks/oom": (EventKind.OOM, task_pb2.TaskOOM),
    "/tasks/paused": (EventKind.PAUSED, task_pb2.TaskPaused),
    "/tasks/resumed": (EventKind.RESUMED, task_pb2.TaskResumed),
}
_TOPICS = (_TOPIC_EXIT, _TOPIC_LOST, *_PLAIN)
"""What is about our containers; most events are not."""


class ContainerdJournal:
    """:class:`services.daemon.containers.runtime.EventJournal` on containerd."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._stub = journal_pb2_grpc.JournalStub(connection.channel)

    async def end(self) -> int:
        """See the interface."""
        request = pb.ReadRequest(
            namespace=self._connection.namespace, from_end=True, no_follow=True
        )
        with self._connection.calls():
            call = self._stub.Read(request, timeout=TIMEOUT_S)
            try:
                first = await call.read()
            finally:
                call.cancel()
        if not isinstance(first, pb.ReadResponse):
            raise Unavailable("containerd's journal ended before it said where it stands")
        return first.next_seq

    async def read(self, from_seq: int, *, follow: bool) -> AsyncIterator[RuntimeEvent]:
        """See the interface."""
        request = pb.ReadRequest(
            namespace=self._connection.namespace, no_follow=not follow, topics=_TOPICS
        )
        setattr(request, "from", from_seq)  # a word of Python
        with self._connection.calls():
            # Following has no deadline: it goes on for as long as both sides live.
            call = self._stub.Read(request, timeout=None if follow else _CATCH_UP_TIMEOUT_S)
            try:
                while (answer := await call.read()) is not grpc.aio.EOF:
                    if isinstance(answer, pb.ReadResponse):
                        yield _event(answer)
            finally:
                call.cancel()
        if follow:
            raise Unavailable("containerd ended the journal's stream: it is being restarted")


def _event(answer: pb.ReadResponse) -> RuntimeEvent:
    entry = answer.entry
    try:
        return _decode(entry, answer.next_seq)
    except DecodeError:
        # Whoever wrote it, it is in the journal for good: pass over it.
        return RuntimeEvent(answer.next_seq, EventKind.OTHER)


def _decode(entry: pb.Entry, next_seq: int) -> RuntimeEvent:
    timestamp_ns = entry.timestamp.ToNanoseconds()
    value = entry.event.value
    if entry.topic == _TOPIC_EXIT:
        exit = task_pb2.TaskExit.FromString(value)
        return RuntimeEvent(
            next_seq,
            EventKind.EXIT,
            exit.container_id,
            "" if exit.id == exit.container_id else exit.id,
            pid=exit.pid,
            exit_code=exit.exit_status,
            exited_at_ns=exit.exited_at.ToNanoseconds() or timestamp_ns,
            timestamp_ns=timestamp_ns,
        )
    if entry.topic == _TOPIC_LOST:
        state = registry_pb2.ProcessState.FromString(value)
        return RuntimeEvent(
            next_seq,
            EventKind.LOST,
            state.container_id,
            state.exec_id,
            pid=state.pid,
            exited_at_ns=state.exited_at.ToNanoseconds() or timestamp_ns,
            timestamp_ns=timestamp_ns,
        )
    if entry.topic in _PLAIN:
        kind, message = _PLAIN[entry.topic]
        event = message.FromString(value)
        return RuntimeEvent(next_seq, kind, event.container_id, timestamp_ns=timestamp_ns)
    return RuntimeEvent(next_seq, EventKind.OTHER, timestamp_ns=timestamp_ns)
