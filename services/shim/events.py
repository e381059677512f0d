"""Events of a shim's containers, as plain data, and where they go.

An event is recorded first (it is in the spool, a crash of the shim does not lose it) and offered
to containerd after that. Fields are named as in containerd's messages; a field ending in ``_ns``
is a time in nanoseconds since the epoch. What no message has a field for (rusage, the OOM flag)
stays in the spool.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from services.common.frozen import frozen

if TYPE_CHECKING:
    from collections.abc import Mapping

TASK_CREATE = "/tasks/create"
TASK_START = "/tasks/start"
TASK_OOM = "/tasks/oom"
TASK_EXIT = "/tasks/exit"
TASK_LOST = "/tasks/lost"
TASK_DELETE = "/tasks/delete"
TASK_EXEC_ADDED = "/tasks/exec-added"
TASK_EXEC_STARTED = "/tasks/exec-started"
TASK_PAUSED = "/tasks/paused"
TASK_RESUMED = "/tasks/resumed"
TASK_CHECKPOINTED = "/tasks/checkpointed"


@frozen
class Event:
    """One event: its topic says which message ``fields`` stand for."""

    topic: str
    fields: Mapping[str, object]


class EventSink(Protocol):
    """Takes events in their order. Nothing here waits for containerd."""

    def record(self, event: Event) -> int:
        """Keep ``event`` on the disk, tell nobody yet; returns its sequence number."""
        ...

    def offer(self, seq: int) -> None:
        """Let a recorded event, and those after it, go out."""
        ...

    def emit(self, event: Event) -> None:
        """Record and offer."""
        ...
