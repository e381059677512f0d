"""Shims and containerd outliving one another: registration, resending, adoption, burial."""

from __future__ import annotations

import asyncio
import json
import signal
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from protos.containerd.services.tasks.v1 import tasks_pb2 as pb
from protos.containerd.task.v3 import shim_pb2
from protos.containerd.types.task import task_pb2
from protos.theseus.shim.v1 import registry_pb2
from services.common import linux
from services.containerd.rpc.encoding import decode_event
from services.containerd.tasks.known import Standing
from services.containerd.tasks.remains import recorded_state
from tests.fakes.task_node import NS, TaskNode

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable
    from pathlib import Path

    from tests.fakes.shim import FakeShim


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[TaskNode]:
    node = TaskNode(tmp_path)
    await node.start()
    yield node
    await node.close()


async def failure(call: Awaitable[Any]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), caught.value.details() or ""


async def get(node: TaskNode, container_id: str) -> task_pb2.Process:
    async with node.client() as client:
        return (
            await client.tasks.Get(pb.GetRequest(container_id=container_id), timeout=10)
        ).process


async def wait(node: TaskNode, container_id: str, exec_id: str = "") -> pb.WaitResponse:
    async with node.client() as client:
        request = pb.WaitRequest(container_id=container_id, exec_id=exec_id)
        return await client.tasks.Wait(request, timeout=10)


async def delete(node: TaskNode, container_id: str) -> pb.DeleteResponse:
    async with node.client() as client:
        return await client.tasks.Delete(
            pb.DeleteTaskRequest(container_id=container_id), timeout=10
        )


async def settled(node: TaskNode, container_id: str, standing: Standing) -> None:
    known = node.shims.get(NS, container_id)
    async with asyncio.timeout(10):
        while known.standing is not standing:
            await known.change()


def bundle_gone(node: TaskNode, container_id: str) -> bool:
    return not (node.state / "tasks" / NS / container_id).exists()


async def test_events_are_acknowledged_and_in_the_journal_once(node: TaskNode) -> None:
    shim = await node.running("c1")
    await shim.acknowledged(2)
    assert await node.topics() == ["/tasks/create", "/tasks/start"]
    assert list((shim.bundle / "spool").iterdir()) == []
    assert shim.welcomes[0].last_acked_seq == 0
    assert shim.welcomes[0].protocol == 1


async def test_a_restarted_containerd_finds_its_shims_and_what_happened_meanwhile(
    node: TaskNode,
) -> None:
    shims = [await node.running(f"c{index}") for index in range(5)]
    await node.stop()
    await shims[0].exit("", 42)
    await node.start()
    for shim in shims:
        await shim.registered(2)
    assert [shim.welcomes[1].epoch for shim in shims] == [2] * 5
    assert shims[0].welcomes[1].last_acked_seq == 2
    assert shims[0].welcomes[1].containerd_id != shims[0].welcomes[0].containerd_id
    assert (await wait(node, "c0")).exit_status == 42
    assert (await get(node, "c1")).status == task_pb2.RUNNING
    await shims[0].acknowledged(3)
    assert (await node.topics()).count("/tasks/exit") == 1
    assert (await delete(node, "c0")).exit_status == 42
    assert node.sample("theseus_containerd_shims_settled_total", {"outcome": "registered"}) == 5


async def test_a_start_can_tell_when_all_shims_are_back(node: TaskNode) -> None:
    shims = [await node.running(f"c{index}") for index in range(3)]
    await node.stop()
    await node.start()
    await node.shims.returned(10.0)
    assert [node.shims.get(NS, shim.id).standing for shim in shims] == [Standing.REGISTERED] * 3


async def test_a_shim_that_does_not_come_back_is_not_waited_for_without_end(
    node: TaskNode,
) -> None:
    shim = await node.running("c1")
    await node.stop()
    await shim.stop_registering()
    await node.start()
    await node.shims.returned(0.01)


async def test_an_event_whose_acknowledgement_was_lost_is_journaled_once(node: TaskNode) -> None:
    shim = await node.running("c1")
    shim.ignore_acks = True
    await shim.exit("", 5)
    await node.until_topic("/tasks/exit")
    await node.stop()
    assert [path.name for path in (shim.bundle / "spool").iterdir()] == ["3"]
    shim.ignore_acks = False
    await node.start()
    await shim.registered(2)
    assert shim.welcomes[1].last_acked_seq == 3
    assert (await node.topics()).count("/tasks/exit") == 1


async def test_an_event_is_not_acknowledged_before_it_is_on_the_disk(
    node: TaskNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    shim = await node.running("c1")
    reached, release = asyncio.Event(), asyncio.Event()
    write = node.metadata.db.write

    async def slow(function: Any) -> Any:
        reached.set()
        await release.wait()
        return await write(function)

    monkeypatch.setattr(node.metadata.db, "write", slow)
    await shim.exit("", 5)
    await reached.wait()
    assert shim.acked == 2
    monkeypatch.undo()
    await node.stop()  # between the event's arrival and its commit
    assert (shim.bundle / "spool" / "3").exists()
    await node.start()
    await shim.acknowledged(3)
    assert (await node.topics()).count("/tasks/exit") == 1
    release.set()


async def test_many_events_come_in_their_order(node: TaskNode) -> None:
    shim = await node.running("c1")
    await shim.stop_registering()
    for index in range(500):
        shim.emit("/tasks/exec-added", container_id="c1", exec_id=f"e{index}")
    await shim.reexec()
    await shim.acknowledged(502)
    added = [
        message.exec_id  # type: ignore[union-attr]
        for _, topic, message in await node.metadata.events()
        if topic == "/tasks/exec-added"
    ]
    assert added == [f"e{index}" for index in range(500)]


async def test_a_newer_registration_ends_the_older_one(node: TaskNode) -> None:
    shim = await node.running("c1")
    async with node.client() as client:
        call = client.registry.Register(timeout=10)
        await call.write(registry_pb2.RegisterRequest(hello=shim.hello()))
        answer: Any = await call.read()
        assert answer.welcome.last_acked_seq == 2
        await shim.refused()
        assert shim.endings[0] is grpc.StatusCode.ABORTED
        # The fake registers again and ends ours in turn.
        assert await call.code() is grpc.StatusCode.ABORTED
    assert node.shims.get(NS, "c1").session is not None


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"namespace": ""}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"id": ""}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"instance_id": "xyz"}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"pid": 0}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"boot_id": "another"}, grpc.StatusCode.FAILED_PRECONDITION),
        ({"protocol_min": 2, "protocol_max": 3}, grpc.StatusCode.FAILED_PRECONDITION),
        ({"instance_id": "0" * 32}, grpc.StatusCode.NOT_FOUND),
        ({"bundle": "/elsewhere"}, grpc.StatusCode.NOT_FOUND),
        ({"id": "nobody"}, grpc.StatusCode.NOT_FOUND),
    ],
)
async def test_a_hello_that_is_wrong_is_refused(
    node: TaskNode, change: dict[str, Any], code: grpc.StatusCode
) -> None:
    shim = await node.running("c1")
    hello = shim.hello()
    for name, value in change.items():
        setattr(hello, name, value)
    async with node.client() as client:
        call = client.registry.Register(timeout=10)
        await call.write(registry_pb2.RegisterRequest(hello=hello))
        assert (await failure(call.read()))[0] is code
        assert not shim.endings


async def test_what_is_not_a_hello_or_an_event_is_refused(node: TaskNode) -> None:
    shim = await node.running("c1")
    async with node.client() as client:
        call = client.registry.Register(timeout=10)
        await call.write(registry_pb2.RegisterRequest(event=registry_pb2.Event(seq=1)))
        assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
        await shim.stop_registering()
        call = client.registry.Register(timeout=10)
        await call.write(registry_pb2.RegisterRequest(hello=shim.hello()))
        await call.read()
        await call.write(registry_pb2.RegisterRequest(hello=shim.hello()))
        assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_wait_outlives_a_shim_that_is_re_executed(node: TaskNode) -> None:
    shim = await node.running("c1")
    waiting = asyncio.ensure_future(wait(node, "c1"))
    await shim.called("Wait")
    shim.calls.clear()
    await shim.reexec()
    await shim.called("Wait")
    await shim.exit("", 9)
    assert (await waiting).exit_status == 9


async def test_a_wait_learns_of_an_exit_that_was_deleted_between_two_questions(
    node: TaskNode,
) -> None:
    shim = await node.running("c1")
    waiting = asyncio.ensure_future(wait(node, "c1"))
    await shim.called("Wait")
    await shim.stop_serving()
    await shim.exit("", 9)
    await shim.acknowledged(3)
    del shim.processes[""]
    await shim.serve()
    assert (await waiting).exit_status == 9


async def test_a_list_has_the_record_of_a_shim_that_is_not_back_yet(node: TaskNode) -> None:
    shim = await node.running("c1")
    await node.stop()
    await shim.stop_registering()
    shim.hanging.add("State")

    def record(**changes: Any) -> None:
        init = {
            "exec_id": "",
            "pid": 77,
            "status": "paused",
            "stdin": "",
            "stdout": "file:///log",
            "stderr": "",
            "terminal": False,
            "exit_status": None,
            "exited_at_ns": None,
            **changes,
        }
        containers = [{"id": "c1", "processes": [{**init, "exec_id": "e1"}, init]}]
        (shim.bundle / "state.json").write_text(json.dumps({"containers": containers}))

    record()
    await node.start()
    (found,) = await node.tasks.states(NS)
    assert (found.id, found.pid, found.status.name) == ("c1", 77, "PAUSED")
    assert found.stdio.stdout == "file:///log"
    record(status="stopped", exit_status=42, exited_at_ns=5)
    (found,) = await node.tasks.states(NS)
    assert (found.status.name, found.exit_status, found.exited_at_ns) == ("STOPPED", 42, 5)
    record(status="stopped")  # lost: that is for the shim to explain
    assert recorded_state(node.bundles.find(NS, "c1"), node.shims.get(NS, "c1").process) is None


async def test_a_call_waits_for_a_shim_that_is_not_back_yet(node: TaskNode) -> None:
    shim = await node.running("c1")
    await node.stop()
    shim.registering = False
    await node.start()
    asking = asyncio.ensure_future(get(node, "c1"))
    async with node.client() as client:
        code, _ = await failure(client.tasks.Get(pb.GetRequest(container_id="c1"), timeout=0.2))
        assert code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert not asking.done()
    shim.registering = True
    assert (await asking).status == task_pb2.RUNNING


async def test_a_shim_that_does_not_register_is_dialled_and_adopted(node: TaskNode) -> None:
    shim = await node.running("c1")
    await node.stop()
    shim.registering = False
    node.grace_s = 0.1
    await node.start()
    assert (await get(node, "c1")).status == task_pb2.RUNNING
    assert "Connect" in shim.calls
    told: Any = decode_event(await node.until_topic("/shims/adopted"))
    assert (told.id, told.instance_id) == ("c1", shim.instance_id)
    assert node.sample("theseus_containerd_shims_settled_total", {"outcome": "adopted"}) == 1
    # It registers later, and its events come then.
    await shim.exit("", 4)
    shim.registering = True
    await shim.acknowledged(3)
    assert (await wait(node, "c1")).exit_status == 4


async def test_a_silent_shim_is_not_given_up(node: TaskNode) -> None:
    shim = await node.running("c1")
    await node.stop()
    shim.registering = False
    await shim.stop_serving()
    node.grace_s = 0.1
    await node.start()
    await settled(node, "c1", Standing.SILENT)
    async with node.client() as client:
        code, text = await failure(client.tasks.Get(pb.GetRequest(container_id="c1"), timeout=10))
    assert code is grpc.StatusCode.UNAVAILABLE
    assert str(shim.pid) in text
    await shim.serve()
    await settled(node, "c1", Standing.REACHABLE)
    assert (await get(node, "c1")).status == task_pb2.RUNNING


async def test_a_shim_that_died_leaves_the_true_status_in_its_spool(node: TaskNode) -> None:
    shim = await node.running("c1")
    await node.stop()
    await shim.stop_registering()
    await shim.exit("", 42)
    await shim.die()
    await node.start()
    assert (await wait(node, "c1")).exit_status == 42
    process = await get(node, "c1")
    assert (process.status, process.exit_status) == (task_pb2.STOPPED, 42)
    told: Any = decode_event(await node.until_topic("/shims/gone"))
    assert [(end.exit_status, end.exit_status_lost) for end in told.processes] == [(42, False)]
    assert (await delete(node, "c1")).exit_status == 42
    assert bundle_gone(node, "c1")
    assert await node.topics() == [
        "/tasks/create",
        "/tasks/start",
        "/tasks/exit",
        "/shims/gone",
        "/tasks/delete",
    ]


async def test_a_status_that_the_journal_has_outlives_the_shim(node: TaskNode) -> None:
    shim = await node.running("c1")
    await shim.exit("", 42)
    await shim.acknowledged(3)
    await node.stop()
    await shim.die()
    await node.start()
    assert (await wait(node, "c1")).exit_status == 42
    assert (await node.topics()).count("/tasks/exit") == 1


async def test_a_shim_that_dies_over_a_running_container_ends_it_with_its_true_status(
    node: TaskNode,
) -> None:
    shim = await node.running("c1")
    init = shim.processes[""].child
    assert init is not None
    waiting = asyncio.ensure_future(wait(node, "c1"))
    await shim.called("Wait")
    await shim.die()
    # It was killed: that is what happened, and what the kernel's record says.
    assert (await waiting).exit_status == 128 + signal.SIGKILL
    assert await init.wait() == -signal.SIGKILL
    assert (await get(node, "c1")).status == task_pb2.STOPPED
    exits: Any = decode_event(await node.until_topic("/tasks/exit"))
    assert (exits.exit_status, exits.pid) == (137, init.pid)
    async with node.client() as client:
        code, text = await failure(
            client.tasks.Pause(pb.PauseTaskRequest(container_id="c1"), timeout=10)
        )
        assert code is grpc.StatusCode.FAILED_PRECONDITION
        assert "has died" in text
        code, _ = await failure(
            client.tasks.Kill(pb.KillRequest(container_id="c1", signal=9), timeout=10)
        )
        assert code is grpc.StatusCode.NOT_FOUND
        pids = await client.tasks.ListPids(pb.ListPidsRequest(container_id="c1"), timeout=10)
        assert not pids.processes
    assert (await delete(node, "c1")).exit_status == 137


async def test_a_status_that_nobody_can_know_is_lost_in_words(node: TaskNode) -> None:
    shim = await node.running("c1")
    await node.stop()
    await shim.die()
    init = shim.processes[""].child
    assert init is not None
    init.terminate()
    await init.wait()
    await node.start()
    async with node.client() as client:
        code, text = await failure(client.tasks.Wait(pb.WaitRequest(container_id="c1"), timeout=10))
        assert code is grpc.StatusCode.DATA_LOSS
        assert "exit status is lost" in text
        assert f"(pid {shim.pid}) has died" in text
    process = await get(node, "c1")
    assert (process.status, process.exit_status) == (task_pb2.UNKNOWN, 0)
    lost: Any = decode_event(await node.until_topic("/tasks/lost"))
    assert (lost.container_id, lost.exit_status_lost) == ("c1", True)
    await node.restart()  # what was found out is kept
    async with node.client() as client:
        code, text = await failure(
            client.tasks.Delete(pb.DeleteTaskRequest(container_id="c1"), timeout=10)
        )
    assert code is grpc.StatusCode.DATA_LOSS
    assert bundle_gone(node, "c1")
    topics = await node.topics()
    assert topics.count("/tasks/lost") == 1
    assert "/tasks/exit" not in topics


async def test_state_of_another_boot_is_void(node: TaskNode) -> None:
    shim = await node.running("c1")
    await shim.exit("", 42)
    await shim.acknowledged(3)
    other = await node.running("c2")
    await node.stop()
    for victim in (shim, other):
        await victim.die()
        record = json.loads((victim.bundle / "shim.json").read_text())
        (victim.bundle / "shim.json").write_text(json.dumps(record | {"boot_id": "another"}))
    survivor = other.processes[""].child
    assert survivor is not None
    await node.start()
    assert (await wait(node, "c1")).exit_status == 42
    async with node.client() as client:
        code, text = await failure(client.tasks.Wait(pb.WaitRequest(container_id="c2"), timeout=10))
    assert code is grpc.StatusCode.DATA_LOSS
    assert "the machine was restarted" in text
    assert survivor.returncode is None  # a pid of another boot is somebody else's
    assert (await node.topics()).count("/shims/void") == 2


async def test_a_shim_without_a_task_is_removed_after_a_restart(node: TaskNode) -> None:
    await node.container("c1")
    node.factory.prepare = [("hanging", {"Create"})]
    known = await node.shims.begin(NS, "c1", b"{}")
    await node.shims.start(node.factory, known)
    shim = node.shim("c1")
    await node.stop()  # while the task was being created
    await node.start()
    async with asyncio.timeout(10):
        await node.shims_removed()
    assert not shim.alive
    assert bundle_gone(node, "c1")


async def test_a_bundle_whose_shim_never_came_up_is_removed(node: TaskNode) -> None:
    await node.shims.begin(NS, "c1", b"{}")
    await node.stop()
    node.grace_s = 0.1
    await node.start()
    async with asyncio.timeout(10):
        await node.shims_removed()
    assert bundle_gone(node, "c1")


@pytest.mark.parametrize("step", ["marked", "answered", "shim gone", "half a bundle"])
async def test_a_deletion_goes_on_after_a_restart(node: TaskNode, step: str) -> None:
    shim = await node.running("c1")
    await shim.exit("", 1)
    await node.stop()
    if step == "half a bundle":
        await shim.die()
        shim.bundle.rename(shim.bundle.with_name(".c1.0000"))
    else:
        note = {"clean": True, "exit_status": 1} if step == "answered" else {}
        (shim.bundle / "deleting").write_text(json.dumps(note))
        if step == "shim gone":
            await shim.die()
    await node.start()
    async with asyncio.timeout(10):
        await node.shims_removed()
    assert not shim.alive
    assert list((node.state / "tasks" / NS).iterdir()) == []
    if step != "half a bundle":
        assert (await node.topics()).count("/tasks/exit") == 1


@pytest.mark.parametrize("shim_dies", [False, True])
async def test_a_deletion_that_was_told_goes_on_though_it_was_not_marked(
    node: TaskNode, monkeypatch: pytest.MonkeyPatch, *, shim_dies: bool
) -> None:
    async def stop_here(*_arguments: object) -> None:
        await asyncio.Event().wait()

    # The trace point: the deletion is answered, ``deleting`` is not written.
    monkeypatch.setattr(node.shims._undertaker, "mark", stop_here)
    monkeypatch.setattr("services.containerd.tasks.shims._LEAVE_S", 0.05)
    shim = await node.running("c1")
    await shim.exit("", 1)
    assert (await delete(node, "c1")).exit_status == 1
    await node.stop()
    assert not (shim.bundle / "deleting").exists()
    if shim_dies:
        await shim.die()
    await node.start()
    async with node.client() as client:
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await client.tasks.Get(pb.GetRequest(container_id="c1"), timeout=10)
        assert refusal.value.code() is grpc.StatusCode.NOT_FOUND
        await client.tasks.Create(pb.CreateTaskRequest(container_id="c1"), timeout=10)
    assert node.shim("c1") is not shim
    assert not shim.alive
    topics = await node.topics()
    assert topics.count("/tasks/exit") == topics.count("/tasks/delete") == 1


async def test_a_deletion_that_the_shim_could_not_tell_of_is_marked_before_it_is_answered(
    node: TaskNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.containerd.tasks.shims._TOLD_S", 0.05)
    shim = await node.running("c1")
    await shim.exit("", 1)
    await shim.stop_registering()
    shim.hanging.add("Shutdown")
    assert (await delete(node, "c1")).exit_status == 1
    assert (shim.bundle / "deleting").exists()
    await shim.die()


def note_runtime(node: TaskNode, shim: FakeShim) -> Path:
    """Give a shim a runtime that writes down what it is asked; returns where."""
    calls, program = node.root / "calls", node.root / "runtime"
    program.write_text(f'#!/bin/sh\necho "$3 $4 $5" >> {calls}\n')
    program.chmod(0o755)
    shim.runtime = str(program)
    shim.forgetting = False
    return calls


async def test_a_shim_that_dies_before_the_runtime_forgot_has_it_told(node: TaskNode) -> None:
    shim = await node.running("c1")
    calls = note_runtime(node, shim)
    await shim.exit("", 1)
    shim.hanging.add("Shutdown")
    assert (await delete(node, "c1")).exit_status == 1
    assert not calls.exists()  # the shim is at it
    await shim.die()
    async with asyncio.timeout(10):
        await node.shims_removed()
    assert calls.read_text() == "delete --force c1\n"
    assert bundle_gone(node, "c1")


@pytest.mark.parametrize("shim_dies", [False, True])
async def test_a_deletion_that_containerd_did_not_live_to_hear_of_is_finished(
    node: TaskNode, *, shim_dies: bool
) -> None:
    shim = await node.running("c1")
    calls = note_runtime(node, shim)
    await shim.exit("", 1)
    await node.stop()
    await shim.Delete(shim_pb2.DeleteRequest(), None)
    if shim_dies:
        await shim.die()
    else:  # the runtime forgets, as it does before the shim ends
        shim.unforgotten.clear()
        shim.write_state()
    await node.start()
    async with asyncio.timeout(10):
        await node.shims_removed()
    assert calls.exists() == shim_dies
    assert bundle_gone(node, "c1")
    topics = await node.topics()
    assert topics.count("/tasks/exit") == topics.count("/tasks/delete") == 1
    async with node.client() as client:  # the id is free
        await client.tasks.Create(pb.CreateTaskRequest(container_id="c1"), timeout=10)


async def test_a_burial_that_was_cut_short_is_repeated(
    node: TaskNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    shim = await node.running("c1")
    reached = asyncio.Event()

    async def stop_here(*_arguments: object) -> None:
        reached.set()
        await asyncio.Event().wait()

    # The trace point: the exit is in the journal, gone.json is not written.
    monkeypatch.setattr("services.containerd.tasks.undertaker.delete_container", stop_here)
    await shim.die()
    await reached.wait()
    monkeypatch.undo()
    await node.restart()
    assert (await wait(node, "c1")).exit_status == 137
    topics = await node.topics()
    assert topics.count("/tasks/exit") == 1
    assert topics.count("/shims/gone") == 1


async def test_a_shim_that_kept_its_pid_but_not_its_start_time_is_dead(node: TaskNode) -> None:
    shim = await node.running("c1")
    await node.stop()
    await shim.stop_registering()
    await shim.exit("", 3)
    record = json.loads((shim.bundle / "shim.json").read_text())
    (shim.bundle / "shim.json").write_text(json.dumps(record | {"start_time": 1}))
    await node.start()
    assert (await wait(node, "c1")).exit_status == 3
    assert shim.alive  # that pid is another process now, so nobody touches it
    assert linux.process_start_time(shim.pid) == shim.start_time


async def test_a_draining_containerd_sends_shims_to_its_successor(node: TaskNode) -> None:
    shim = await node.running("c1")
    node.shims.drain()
    await shim.refused()
    assert set(shim.endings) == {grpc.StatusCode.UNAVAILABLE}
