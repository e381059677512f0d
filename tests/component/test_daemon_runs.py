"""The daemon starts a container by one call of containerd's, where nobody waits to be coupled."""

from __future__ import annotations

import grpc
import pytest

from protos.theseus.engine.v1 import containers_pb2 as pb
from tests.fakes.attached_client import AttachedClient
from tests.fakes.engine import engine

QUIET = {"network_mode": "none"}
RUNNING = pb.CONTAINER_STATE_RUNNING
EXITED = pb.CONTAINER_STATE_EXITED


@pytest.fixture
async def made():
    async with engine() as running:
        running.node.serves_runs = True
        yield running


def starting(node):
    """The calls that begin a run."""
    wanted = ("Containers.Create", "Runs.Run", "Tasks.Create", "Tasks.Start")
    return [call for call in node.calls if call in wanted]


async def test_a_start_is_one_call(made):
    identity = await made.run("one", **QUIET)
    assert starting(made.node) == ["Runs.Run"]
    assert made.node.world.containers[identity].labels["theseus.container.name"] == "one"
    found = await made.get("one")
    assert (found.state, found.pid) == (RUNNING, made.node.world.process(identity).pid)
    made.node.world.end(identity, 3)
    assert (await made.wait("one")).code == 3


async def test_who_attached_is_coupled_before_anything_runs(made):
    identity = await made.create("one", **QUIET)
    client = AttachedClient(made.containers.Attach, container="one")
    await client.begin()
    await made.begin("one")
    assert starting(made.node) == ["Containers.Create", "Tasks.Create", "Tasks.Start"]
    made.node.world.write(identity, b"out")
    made.node.world.end(identity, 0)
    await client.rest()
    assert client.output == b"out"


async def test_an_older_containerd_is_asked_by_steps(made):
    made.node.serves_runs = False
    await made.run("one", **QUIET)
    expected = ["Runs.Run", "Containers.Create", "Tasks.Create", "Tasks.Start"]
    assert starting(made.node) == expected


async def test_an_older_containerd_is_asked_once_until_it_may_be_another(made):
    made.node.serves_runs = False
    for name in ("one", "two", "three"):
        await made.run(name, **QUIET)
    assert made.node.calls.count("Runs.Run") == 1
    assert made.node.calls.count("Tasks.Start") == 3
    # Upgraded while nobody called it.
    await made.node.stop()
    made.node.serves_runs = True
    await made.node.start()
    for name in ("four", "five"):
        await made.run(name, **QUIET)
    assert made.node.calls.count("Runs.Run") == 3
    assert made.node.calls.count("Tasks.Start") == 3


async def test_a_command_that_cannot_run_leaves_nothing(made):
    identity = await made.create("one", **QUIET)
    invalid = grpc.StatusCode.INVALID_ARGUMENT
    made.node.fail("Runs.Run", invalid, "exec: nosuch", reason="COMMAND_NOT_FOUND")
    with pytest.raises(grpc.aio.AioRpcError):
        await made.begin("one")
    found = await made.get("one")
    assert (found.state, found.exit.code, found.exit.error) == (EXITED, 127, "exec: nosuch")
    left = made.left()
    assert (left["tasks"], left["records"], left["snapshots"]) == ([], [], [identity])


@pytest.mark.parametrize(
    "lost", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED], ids=str
)
async def test_a_start_whose_answer_is_lost_counts(made, lost):
    def end(request):
        made.node.world.end(request.container.id, 7)

    made.node.lose("Runs.Run", lost, end)
    identity = await made.create("one", **QUIET)
    if lost is grpc.StatusCode.DEADLINE_EXCEEDED:
        with pytest.raises(grpc.aio.AioRpcError):
            await made.begin("one")
    else:  # the call is made again
        await made.begin("one")
    status = await made.wait(identity)
    assert (status.code, status.error) == (7, "")
    assert len(made.node.world.tasks.get(identity, {"": None})) == 1


@pytest.mark.parametrize(
    ("step", "runs"), [("start:connected", False), ("start:started", True)], ids=str
)
async def test_a_crash_while_starting_is_settled(made, step, runs):
    identity = await made.create("one", **QUIET)
    await made.stop()
    await made.killed_at(step, lambda engine: engine.begin("one"))
    await made.start()
    store = made.app._below.store
    await made.until(lambda: store.get(identity).state != "starting")
    if not runs:
        await made.begin("one")
    assert (await made.get("one")).state == RUNNING
    made.node.world.end(identity, 3)
    assert (await made.wait("one")).code == 3
