"""What starts and ends of runs make of a record: plain functions, used inside transactions."""

from __future__ import annotations

import dataclasses
import time

from services.daemon.containers.record import ContainerRecord, ExitStatus, State
from services.daemon.containers.states import Action, after

ENDED_WITH_CONTAINER = "it ended together with its container: how is not known"


def starting(record: ContainerRecord) -> ContainerRecord:
    """A start begins."""
    return dataclasses.replace(
        record,
        state=after(record, Action.START),
        runs=record.runs + 1,
        unclean=True,
        starting_at_ns=time.time_ns(),
        started_at_ns=0,
        pid=0,
        oom_killed=False,
        early_exit=None,
        endpoints=(),
        ports=(),
    )


def running(record: ContainerRecord, *, pid: int, started_at_ns: int) -> ContainerRecord | None:
    """The start succeeded; it may be over already."""
    if record.state is not State.STARTING:
        return None
    begun = dataclasses.replace(
        record, state=after(record, Action.RUN), pid=pid, started_at_ns=started_at_ns
    )
    return begun if record.early_exit is None else ended(begun, record.early_exit)


def ended(record: ContainerRecord, status: ExitStatus) -> ContainerRecord | None:
    """The run ended, or its start failed, with ``status``; None when that is known already."""
    if not record.live:
        return None
    return dataclasses.replace(
        record,
        state=after(record, Action.EXIT),
        pid=0,
        exits=record.exits + 1,
        early_exit=None,
        exit=dataclasses.replace(status, oom_killed=status.oom_killed or record.oom_killed),
    )


def exited(record: ContainerRecord, *, pid: int, status: ExitStatus) -> ContainerRecord | None:
    """Init of some run was seen to end; None when it is not the present run's.

    While a start is under way the end is only noted: the start decides what it means.
    """
    if not record.live or (record.pid and pid and record.pid != pid):
        return None
    if record.state is not State.STARTING:
        return ended(record, status)
    if status.finished_at_ns < record.starting_at_ns:
        return None
    return dataclasses.replace(record, early_exit=status)


def abandoned(record: ContainerRecord) -> ContainerRecord | None:
    """The start was given up before anything ran: the container is what it was before."""
    if record.state is not State.STARTING:
        return None
    first = record.exits == 0
    action = Action.ABANDON_FIRST_START if first else Action.ABANDON_START
    return dataclasses.replace(record, state=after(record, action), pid=0, early_exit=None)


def lost(reason: str, finished_at_ns: int) -> ExitStatus:
    """An end that nobody can know."""
    return ExitStatus(code=0, finished_at_ns=finished_at_ns, lost=True, error=reason)
