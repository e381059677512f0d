"""The life of a container: which action leads from which state to which.

creating ─▶ created ─▶ starting ─▶ running ◀─▶ paused
    │          ▲ │        │  ▲        │           │
    │          └─┼────────┤  │        ▼           │
    │            │        └──┼────▶ exited ◀──────┘
    ▼            ▼           └──────  │
 removing ◀──────┴────────────────────┘
"""

from __future__ import annotations

import enum

from services.common.errors import FailedPrecondition
from services.daemon.containers.record import ContainerRecord, State


class Action(enum.StrEnum):
    """What can happen to a container."""

    FINISH_CREATE = "finish creating"
    START = "start"
    ABANDON_FIRST_START = "abandon the first start of"
    ABANDON_START = "abandon the start of"
    RUN = "run"
    EXIT = "exit"
    PAUSE = "pause"
    RESUME = "resume"
    REMOVE = "remove"


_NEXT: dict[tuple[State, Action], State] = {
    (State.CREATING, Action.FINISH_CREATE): State.CREATED,
    (State.CREATING, Action.REMOVE): State.REMOVING,
    (State.CREATED, Action.START): State.STARTING,
    (State.CREATED, Action.REMOVE): State.REMOVING,
    (State.STARTING, Action.ABANDON_FIRST_START): State.CREATED,
    (State.STARTING, Action.ABANDON_START): State.EXITED,
    (State.STARTING, Action.RUN): State.RUNNING,
    (State.STARTING, Action.EXIT): State.EXITED,
    (State.RUNNING, Action.PAUSE): State.PAUSED,
    (State.RUNNING, Action.EXIT): State.EXITED,
    (State.PAUSED, Action.RESUME): State.RUNNING,
    (State.PAUSED, Action.EXIT): State.EXITED,
    (State.EXITED, Action.START): State.STARTING,
    (State.EXITED, Action.REMOVE): State.REMOVING,
}


def allows(state: State, action: Action) -> bool:
    """Whether ``action`` is possible in ``state``."""
    return (state, action) in _NEXT


def after(record: ContainerRecord, action: Action) -> State:
    """The state that ``action`` leads to.

    Raises:
        FailedPrecondition: the action is not possible in the record's state.
    """
    following = _NEXT.get((record.state, action))
    if following is None:
        raise FailedPrecondition(
            f"cannot {action} container {record.name}: it is {record.state}",
            resource=("container", record.id),
        )
    return following
