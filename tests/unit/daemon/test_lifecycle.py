"""States, outcomes and signals: plain functions of a record."""

from __future__ import annotations

import dataclasses
import signal

import pytest

from services.common.errors import FailedPrecondition, InvalidArgument
from services.daemon.containers import codec, outcome
from services.daemon.containers.record import (
    ContainerConfig,
    ContainerId,
    ContainerRecord,
    Endpoint,
    ExecConfig,
    ExecId,
    ExecRecord,
    ExecState,
    ExitStatus,
    Mount,
    MountKind,
    PortMapping,
    Resources,
    State,
    Tombstone,
)
from services.daemon.containers.signals import parse_signal
from services.daemon.containers.states import Action, after, allows
from services.daemon.images.image import ImageId, RunImage
from services.daemon.spec.request import ImageConfig


def record(state=State.CREATED, **fields):
    return ContainerRecord(
        **{
            "id": ContainerId("a" * 64),
            "name": "web",
            "config": ContainerConfig("busybox"),
            "image": RunImage(ImageId("sha256:1"), "busybox", "", ImageConfig()),
            "args": ("sh",),
            "state": state,
            "created_at_ns": 1,
            **fields,
        }
    )


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("action", Action)
def test_every_action_leads_somewhere_or_is_refused_by_name(state, action):
    if allows(state, action):
        assert after(record(state), action) is not state
    else:
        with pytest.raises(FailedPrecondition) as refused:
            after(record(state), action)
        assert str(action) in refused.value.message
        assert str(state) in refused.value.message


def test_a_live_container_cannot_be_removed():
    for state in (State.STARTING, State.RUNNING, State.PAUSED):
        assert record(state).live
        assert not allows(state, Action.REMOVE)


def test_a_run_from_start_to_end():
    begun = outcome.starting(record())
    assert (begun.state, begun.runs, begun.unclean) == (State.STARTING, 1, True)
    running = outcome.running(begun, pid=7, started_at_ns=5)
    assert (running.state, running.pid) == (State.RUNNING, 7)
    ended = outcome.exited(running, pid=7, status=ExitStatus(3, 9))
    assert (ended.state, ended.exit.code, ended.exits, ended.pid) == (State.EXITED, 3, 1, 0)
    assert outcome.exited(ended, pid=7, status=ExitStatus(4, 9)) is None


def test_an_exit_of_another_process_is_not_ours():
    running = record(State.RUNNING, pid=7)
    assert outcome.exited(running, pid=8, status=ExitStatus(1, 9)) is None


def test_an_exit_during_the_start_waits_for_the_start():
    begun = outcome.starting(record())
    late = ExitStatus(1, begun.starting_at_ns - 1)
    assert outcome.exited(begun, pid=3, status=late) is None  # of the run before
    noted = outcome.exited(begun, pid=3, status=ExitStatus(5, begun.starting_at_ns + 1))
    assert (noted.state, noted.early_exit.code) == (State.STARTING, 5)
    done = outcome.running(noted, pid=3, started_at_ns=1)
    assert (done.state, done.exit.code, done.early_exit) == (State.EXITED, 5, None)
    failed = outcome.ended(noted, ExitStatus(127, 9, error="not found"))
    assert (failed.state, failed.exit.code, failed.exits) == (State.EXITED, 127, 1)


def test_a_start_given_up_changes_nothing():
    first = outcome.abandoned(outcome.starting(record()))
    assert (first.state, first.exit) == (State.CREATED, None)
    before = record(State.EXITED, exits=1, exit=ExitStatus(3, 1))
    again = outcome.abandoned(outcome.starting(before))
    assert (again.state, again.exit.code) == (State.EXITED, 3)
    assert outcome.abandoned(record(State.RUNNING)) is None


def test_an_oom_of_the_run_is_in_its_exit():
    running = record(State.RUNNING, pid=7, oom_killed=True)
    assert outcome.exited(running, pid=7, status=ExitStatus(137, 9)).exit.oom_killed
    assert not outcome.starting(record(State.EXITED, oom_killed=True)).oom_killed


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("", 99),
        ("TERM", signal.SIGTERM),
        ("SIGTERM", signal.SIGTERM),
        ("sigterm", signal.SIGTERM),
        ("9", 9),
        ("64", 64),
        ("RTMIN", int(signal.SIGRTMIN)),
        ("SIGRTMIN+3", int(signal.SIGRTMIN) + 3),
        ("RTMAX-1", int(signal.SIGRTMAX) - 1),
    ],
)
def test_signals_by_name_and_number(text, number):
    assert parse_signal(text, default=99) == number


@pytest.mark.parametrize("text", ["0", "65", "-1", "NOPE", "SIG", "RTMIN+99", "RTMIN-1", "9x", "²"])
def test_no_such_signal(text):
    with pytest.raises(InvalidArgument, match="invalid signal"):
        parse_signal(text, default=1)


def test_records_survive_the_database_unchanged():
    full = record(
        State.EXITED,
        config=ContainerConfig(
            image="busybox",
            command=("a", "b"),
            entrypoint=("e",),
            env=("A=1",),
            labels={"k": "v"},
            mounts=(Mount(MountKind.TMPFS, "", "/t", options=("size=1m",)),),
            ports=(PortMapping(80, 8080),),
            resources=Resources(memory_bytes=1 << 30),
            cap_add=("NET_ADMIN",),
        ),
        image=RunImage(
            ImageId("sha256:1"),
            "busybox",
            "sha256:2",
            ImageConfig(env=("B=2",), volumes=("/v",), labels={"l": "m"}),
        ),
        exit=ExitStatus(3, 9, oom_killed=True),
        early_exit=ExitStatus(4, 9),
        mounts=(Mount(MountKind.VOLUME, "v", "/v", directory="/d", anonymous=True),),
        endpoints=(Endpoint("bridge", "10.0.0.2", 16, "10.0.0.1", "02:00"),),
        ports=(PortMapping(80, 8080, "0.0.0.0", "tcp"),),
    )
    for one in (full, record()):
        assert codec.container_record(codec.container_row(one)) == one
    session = ExecRecord(
        ExecId("e"),
        full.id,
        1,
        ExecConfig(("sh", "-c"), env=("A=1",), tty=True),
        ExecState.EXITED,
        exit=ExitStatus(1, 2),
    )
    assert codec.exec_record(codec.exec_row(session)) == session
    stone = Tombstone(full.id, "web", None, 5)
    assert codec.tombstone(codec.tombstone_row(stone)) == stone


def test_rows_of_the_version_before_and_after_are_read():
    row = codec.container_row(record())
    newer = dataclasses.replace(row, record={**row.record, "unknown": 1})
    assert codec.container_record(newer) == record()
    rest = {
        k: v for k, v in row.record.items() if k in ("config", "image", "args", "created_at_ns")
    }
    assert codec.container_record(dataclasses.replace(row, record=rest)) == record()
