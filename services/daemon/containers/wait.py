"""Waiting for the end of containers, that of removed ones included."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

from services.common.errors import NotFound
from services.daemon.containers.record import State

if TYPE_CHECKING:
    from collections.abc import Callable

    from services.daemon.containers.record import ContainerRecord, ExitStatus
    from services.daemon.containers.store import ContainerStore


class Condition(enum.Enum):
    """What is waited for."""

    NOT_RUNNING = enum.auto()
    NEXT_EXIT = enum.auto()
    REMOVED = enum.auto()


class Waiter:
    """Answers once a condition is met."""

    def __init__(self, store: ContainerStore) -> None:
        self._store = store

    async def wait(self, reference: str, condition: Condition) -> ExitStatus | None:
        """How the run ended that was waited for; None for a container that never ran.

        A container that was removed within the last hour still has an answer, under its id, the
        beginning of that, or its name while no other container has it.

        Raises:
            NotFound: there is no such container, and was none.
        """
        try:
            record = self._store.find(reference)
        except NotFound:
            tombstone = self._store.find_tombstone(reference)
            if tombstone is None:
                raise
            return tombstone.exit
        met = _condition(record, condition)
        reached = await self._store.until(record.id, met)
        if reached is not None:
            return reached.exit
        tombstone = self._store.tombstone(record.id)
        return tombstone.exit if tombstone is not None else None


def _condition(record: ContainerRecord, condition: Condition) -> Callable[[ContainerRecord], bool]:
    if condition is Condition.REMOVED:
        return lambda _now: False
    if condition is Condition.NEXT_EXIT:
        return lambda now: now.exits > record.exits and _settled(now)
    return _settled


def _settled(record: ContainerRecord) -> bool:
    """Nothing runs, and the address and the ports are free again."""
    ended = record.state in (State.CREATED, State.EXITED, State.REMOVING)
    return ended and not record.endpoints and not record.ports
