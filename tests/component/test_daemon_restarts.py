"""The daemon and containerd going away and coming back: nothing is lost, nothing is made up."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import suppress

import grpc
import pytest

from protos.containerd.events import task_pb2 as events
from protos.containerd.types.task import task_pb2
from protos.theseus.engine.v1 import containers_pb2 as pb
from protos.theseus.engine.v1 import system_pb2
from tests.fakes.engine import NOTHING, engine

CREATED, RUNNING, PAUSED, EXITED = (
    pb.CONTAINER_STATE_CREATED,
    pb.CONTAINER_STATE_RUNNING,
    pb.CONTAINER_STATE_PAUSED,
    pb.CONTAINER_STATE_EXITED,
)
REMOVED = pb.WaitContainerRequest.CONDITION_REMOVED
QUIET = {"network_mode": "none"}


@pytest.fixture
async def made():
    async with engine() as running:
        yield running


async def test_a_running_container_is_found_again(made):
    identity = await made.run("one")
    await made.restart()
    found = await made.get("one")
    assert (found.state, found.networks[0].ip_address) == (RUNNING, "10.77.0.2")
    made.node.world.end(identity, 9)
    assert (await made.wait("one")).code == 9


async def test_an_exit_while_the_daemon_was_down_is_reported(made):
    identities = [await made.run(f"c{number}", **QUIET) for number in range(5)]
    await made.stop()
    for number, identity in enumerate(identities):
        made.node.world.end(identity, 40 + number)
    await made.start()
    codes = [(await made.wait(f"c{number}")).code for number in range(5)]
    assert codes == [40, 41, 42, 43, 44]


async def test_an_exit_that_is_not_in_the_journal_is_asked_for(made):
    identity = await made.run("one", **QUIET)
    await made.stop()
    made.node.world.end(identity, 42, tell=False)
    await made.start()
    assert (await made.wait("one")).code == 42


async def test_an_event_of_an_earlier_run_does_not_end_a_later_one(made):
    identity = await made.run("one", **QUIET)
    world = made.node.world
    old = world.process(identity)
    await made.stop()
    world.end(identity, 42, tell=False)
    await made.start()
    assert (await made.wait("one")).code == 42  # asked for
    await made.begin("one")
    world.note("/tasks/exit", events.TaskExit(container_id=identity, id=identity, pid=old.pid))
    seen = len(world.journal)
    await made.until(lambda: made.app._follower._next_seq > seen)
    assert (await made.get("one")).state == RUNNING


async def test_a_task_that_containerd_does_not_know_is_lost_in_words(made):
    identity = await made.run("one", **QUIET)
    await made.stop()
    del made.node.world.tasks[identity]  # as after a reboot
    await made.start()
    status = await made.wait("one")
    assert (status.lost, status.code) == (True, 0)
    assert "cannot be known" in status.error
    await made.begin("one")
    assert (await made.get("one")).state == RUNNING


async def test_a_lost_exit_says_why(made):
    identity = await made.run("one", **QUIET)
    made.node.world.tell_lost(identity)
    status = await made.wait("one")
    assert (status.lost, status.code) == (True, 0)
    assert status.error
    other = await made.run("two", **QUIET)
    await made.stop()
    process = made.node.world.process(other)
    process.status, process.lost = task_pb2.UNKNOWN, "nobody saw it end"
    await made.start()
    status = await made.wait("two")
    assert (status.lost, status.error) == (True, "nobody saw it end")


async def test_pausing_while_the_daemon_was_down_is_seen(made):
    identity = await made.run("one", **QUIET)
    await made.stop()
    made.node.world.process(identity).status = task_pb2.PAUSED
    await made.start()
    assert (await made.get("one")).state == PAUSED


async def test_the_daemon_is_sent_only_the_events_that_it_deals_with(made):
    identity = await made.run("one", **QUIET)
    made.node.world.note("/containers/update", events.TaskExit(container_id=identity))
    made.node.world.end(identity, 1)
    assert (await made.wait("one")).code == 1
    assert made.node.world.told == ["/tasks/exit"]
    await made.restart()  # it knows how far it has come
    assert made.node.world.told == ["/tasks/exit"]


async def test_events_are_dealt_with_once_across_restarts(made):
    identity = await made.run("one", **QUIET)
    made.node.world.end(identity, 1)
    await made.wait("one")
    seq = await made.app._db.read(lambda tx: tx.execute("SELECT value FROM meta").fetchone()[0])
    assert int(seq) == len(made.node.world.journal)
    exits = made.app._below.store.get(identity).exits
    await made.restart()
    assert made.app._below.store.get(identity).exits == exits == 1


async def test_a_journal_that_began_anew_is_followed(made):
    identity = await made.run("one", **QUIET)
    for number in range(5):
        other = await made.run(f"gone{number}", **QUIET)
        made.node.world.end(other, 0)
        await made.wait(other)
    await made.stop()
    made.node.world.journal.clear()  # containerd's root was made anew
    made.node.world.end(identity, 8)
    await made.start()
    assert (await made.wait("one")).code == 8


async def test_a_fault_while_following_does_not_end_the_following(made):
    identity = await made.run("one", **QUIET)
    store = made.app._below.store
    working, store.change_in = store.change_in, None  # calling it is a fault of ours
    made.node.world.end(identity, 42)
    await made.until(lambda: not made.app._follower.connected)
    store.change_in = working
    assert (await made.wait("one")).code == 42


async def test_without_containerd_the_daemon_serves_and_says_so(made):
    identity = await made.run("one", **QUIET)
    await made.node.stop()
    assert (await made.get("one")).state == RUNNING
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await made.create("two")
    assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
    assert "cannot be reached" in refused.value.details()
    info = await made.system.Info(system_pb2.InfoRequest(), timeout=20)
    assert not info.containerd_ready
    assert any("does not answer" in warning for warning in info.warnings)
    await made.restart()  # it starts without containerd, too
    assert (await made.get("one")).state == RUNNING
    waiting = asyncio.create_task(made.wait("one"))
    made.node.world.end(identity, 42)
    await made.node.start()
    assert (await waiting).code == 42


async def test_containerd_returning_is_noticed_by_itself(made):
    identity = await made.run("one", **QUIET)
    waiting = asyncio.create_task(made.wait("one"))
    for _ in range(3):
        await made.node.restart()
    made.node.world.end(identity, 6)
    assert (await waiting).code == 6


async def test_a_start_whose_answer_was_lost_is_adopted(made):
    identity = await made.create("one")
    made.node.lose("Tasks.Start")
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await made.begin("one")
    assert failed.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    store = made.app._below.store
    await made.until(lambda: store.get(identity).state == "running")
    await made.begin("one")
    assert made.node.calls.count("Tasks.Start") == 1
    made.node.world.end(identity, 4)
    assert (await made.wait("one")).code == 4


async def test_a_start_cut_off_before_the_task_is_given_up(made):
    identity = await made.create("one")
    made.node.fail("Containers.Create", grpc.StatusCode.UNAVAILABLE, "draining", times=10)
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await made.begin("one")
    assert failed.value.code() == grpc.StatusCode.UNAVAILABLE
    found = await made.get("one")
    assert (found.state, found.HasField("exit")) == (CREATED, False)
    assert made.network.attached() == []
    made.node._faults.clear()
    await made.begin("one")
    assert (await made.get(identity)).state == RUNNING


async def test_a_removal_without_containerd_goes_on_when_it_returns(made):
    identity = await made.create("one")
    await made.node.stop()
    await made.remove("one")
    assert await made.list_all() == []
    assert identity in made.left()["snapshots"]
    await made.node.start()
    await made.until(lambda: made.left() == NOTHING)


async def test_what_is_left_of_a_removed_container_is_removed_after_a_restart(made):
    identity = await made.create("one")
    await made.node.stop()
    await made.remove("one")
    await made.stop()
    await made.node.start()
    await made.start()
    assert await made.list_all() == []
    with pytest.raises(grpc.aio.AioRpcError) as unknown:
        await made.get(identity)
    assert unknown.value.code() == grpc.StatusCode.NOT_FOUND
    await made.create("one")
    await made.until(lambda: identity not in made.left()["snapshots"])


async def test_a_removal_that_the_version_before_has_begun_is_finished(made):
    identity = await made.create("one")
    await made.node.stop()
    await made.stop()
    with sqlite3.connect(made.config.root / "daemon.db") as db:
        db.execute("UPDATE containers SET state = 'removing'")
    db.close()
    await made.node.start()
    await made.start()
    await made.create("one")
    assert not (await made.wait(identity, REMOVED)).HasField("finished_at")
    await made.until(lambda: identity not in made.left()["snapshots"])


async def test_auto_remove_while_the_daemon_was_down(made):
    identity = await made.run("one", auto_remove=True)
    await made.stop()
    made.node.world.end(identity, 11)
    await made.start()
    assert (await made.wait(identity, REMOVED)).code == 11
    await made.until(lambda: made.left() == NOTHING)


async def test_a_second_daemon_on_the_same_root_is_refused(made):
    from dataclasses import replace

    from services.common.errors import FailedPrecondition
    from services.daemon.app import App

    second = replace(made.config, lock_timeout_s=0.0)
    with pytest.raises(FailedPrecondition, match="belongs to process"):
        async with App(second, network=made.network):
            pass


async def test_waiters_are_told_to_come_back_when_the_daemon_stops(made):
    await made.run("one", **QUIET)
    waiting = asyncio.create_task(made.wait("one"))
    following = made.containers.Logs(pb.LogsRequest(container="one", follow=True), timeout=20)
    reading = asyncio.create_task(_first(following))
    draining = made.app._draining
    await made.until(lambda: len(draining._calls) == 2)
    stopping = asyncio.create_task(made.app.__aexit__(None, None, None))
    for task in (waiting, reading):
        with pytest.raises(grpc.aio.AioRpcError) as told:
            await task
        assert told.value.code() == grpc.StatusCode.UNAVAILABLE
    await stopping
    made.app = None
    await made._channel.close()


async def _first(call):
    return await call.read()


async def test_a_restart_asks_once_about_all_that_run(made):
    for number in range(3):
        await made.run(f"c{number}", **QUIET)
    await made.stop()
    made.node.calls.clear()
    await made.start()
    await made.app._follower.settled.wait()
    assert {container.state for container in await made.list_all()} == {RUNNING}
    assert (made.node.calls.count("Tasks.List"), made.node.calls.count("Tasks.Get")) == (1, 0)


CREATE_STEPS = [f"create:{step}" for step in ("recorded", "volumes", "furnished", "filled")]
REMOVE_STEPS = [
    *(
        f"remove:{step}"
        for step in ("recorded", "clean", "snapshot", "network", "volumes", "files")
    ),
    *(f"clean:{step}" for step in ("network", "task", "record")),
]
START_STEPS = {
    "start:recorded": CREATED,
    "start:connected": CREATED,
    "start:record": CREATED,
    "start:task": CREATED,
    "start:started": RUNNING,
}
VOLUME = {"mounts": [pb.Mount(type=pb.Mount.TYPE_VOLUME, target="/data")]}


@pytest.mark.parametrize("step", CREATE_STEPS)
async def test_a_crash_while_creating_leaves_nothing(made, step):
    await made.stop()
    await made.killed_at(step, lambda engine: engine.create("one", **VOLUME))
    await made.start()
    await made.until(lambda: made.left() == NOTHING)
    assert await made.list_all() == []
    await made.create("one", **VOLUME)  # the name is free


@pytest.mark.parametrize("step", REMOVE_STEPS)
async def test_a_crash_while_removing_is_finished_later(made, step):
    identity = await made.run("one", **VOLUME)
    made.node.world.end(identity, 5)
    await made.stop()
    await made.killed_at(step, lambda engine: engine.remove("one", volumes=True, force=True))
    await made.start()
    if step.startswith("clean:"):
        # That clean-up may have been the caretaker's, before the removal began.
        with suppress(grpc.aio.AioRpcError):
            await made.remove("one", volumes=True, force=True)
    assert (await made.wait(identity, REMOVED)).code == 5
    await made.until(lambda: made.left() == NOTHING)


@pytest.mark.parametrize(("step", "state"), START_STEPS.items())
async def test_a_crash_while_starting_is_settled(made, step, state):
    identity = await made.create("one")
    await made.stop()
    await made.killed_at(step, lambda engine: engine.begin("one"))
    await made.start()
    store = made.app._below.store
    await made.until(lambda: store.get(identity).state != "starting")
    assert (await made.get("one")).state == state
    if state == CREATED:
        await made.until(lambda: made.left()["tasks"] == [] == made.left()["network"])
        await made.begin("one")
    made.node.world.end(identity, 3)
    assert (await made.wait("one")).code == 3


def ends_and_loses_the_answer(node, code):
    """The next process ends right after its start, and whoever started it is not told."""

    def end(request):
        node.world.end(request.container_id, code, request.exec_id)

    node.lose("Tasks.Start", grpc.StatusCode.UNAVAILABLE, end)


async def test_a_start_whose_answer_is_lost_counts_even_if_the_container_has_ended(made):
    ends_and_loses_the_answer(made.node, 7)
    await made.run("one", **QUIET)
    status = await made.wait("one")
    assert (status.code, status.error) == (7, "")


async def test_a_start_whose_answer_is_lost_counts_even_if_the_exec_has_ended(made):
    made.node.older = True  # it starts an exec by a call of its own
    await made.run("one", **QUIET)
    request = pb.CreateExecRequest(container="one", command=["sh"])
    identity = (await made.execs.Create(request, timeout=10)).exec_id
    ends_and_loses_the_answer(made.node, 7)
    await made.execs.Start(pb.StartExecRequest(exec_id=identity), timeout=10)
    ended = (await made.execs.Wait(pb.WaitExecRequest(exec_id=identity), timeout=10)).exit
    assert (ended.code, ended.error) == (7, "")
