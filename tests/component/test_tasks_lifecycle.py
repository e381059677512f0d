"""Tasks over a real socket: the life of one, what is undone, what is refused, what is passed on."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage

from protos.containerd.services.tasks.v1 import tasks_pb2 as pb
from protos.containerd.task.v3 import shim_pb2 as pb_shim
from protos.containerd.types import descriptor_pb2, mount_pb2
from protos.containerd.types.runc.options import oci_pb2
from protos.containerd.types.task import task_pb2
from protos.theseus.shim.v1 import streams_pb2
from services.common.errors import Internal
from services.containerd.tasks.checkpoints import MEDIA_TYPE_SPEC, MEDIA_TYPE_STATE
from services.containerd.tasks.line import ShimStartFailed
from tests.fakes.task_node import NS, SPEC, TaskClient, TaskNode

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable
    from pathlib import Path


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[TaskNode]:
    node = TaskNode(tmp_path)
    await node.start()
    yield node
    await node.close()


@pytest.fixture
async def client(node: TaskNode) -> AsyncIterator[TaskClient]:
    async with node.client() as client:
        yield client


async def failure(call: Awaitable[Any]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), caught.value.details() or ""


def nothing_left(node: TaskNode) -> bool:
    tasks = node.state / "tasks" / NS
    return not list(tasks.iterdir()) and not list((node.state / "s").iterdir())


async def test_a_task_lives_from_create_to_delete(node: TaskNode, client: TaskClient) -> None:
    await node.container("c1")
    options = AnyMessage(
        type_url="containerd.runc.v1.Options",
        value=oci_pb2.Options(binary_name="crun").SerializeToString(),
    )
    created = await client.tasks.Create(
        pb.CreateTaskRequest(
            container_id="c1",
            rootfs=[mount_pb2.Mount(type="overlay", source="overlay", options=["lowerdir=/a"])],
            stdout="file:///tmp/log",
            options=options,
        ),
        timeout=10,
    )
    shim = node.shim("c1")
    assert created.pid == shim.processes[""].pid
    request = shim.processes[""].request
    assert (request.bundle, request.stdout) == (str(shim.bundle), "file:///tmp/log")
    assert request.options == options
    assert request.rootfs[0].options == ["lowerdir=/a"]
    assert (shim.bundle / "config.json").read_bytes() == SPEC.value
    started = await client.tasks.Start(pb.StartRequest(container_id="c1"), timeout=10)
    assert started.pid == created.pid
    found = (await client.tasks.Get(pb.GetRequest(container_id="c1"), timeout=10)).process
    assert (found.id, found.status, found.stdout) == ("c1", task_pb2.RUNNING, "file:///tmp/log")
    wait = asyncio.ensure_future(client.tasks.Wait(pb.WaitRequest(container_id="c1"), timeout=10))
    await shim.exit("", 42)
    assert (await wait).exit_status == 42
    deleted = await client.tasks.Delete(pb.DeleteTaskRequest(container_id="c1"), timeout=10)
    assert (deleted.exit_status, deleted.pid) == (42, created.pid)
    assert await node.topics() == [
        "/tasks/create",
        "/tasks/start",
        "/tasks/exit",
        "/tasks/delete",
    ]
    await node.shims_removed()
    assert not shim.alive
    assert nothing_left(node)
    code, _ = await failure(client.tasks.Get(pb.GetRequest(container_id="c1"), timeout=10))
    assert code is grpc.StatusCode.NOT_FOUND


async def test_an_exec_lives_beside_init(node: TaskNode, client: TaskClient) -> None:
    shim = await node.running("c1")
    spec = AnyMessage(type_url="spec", value=b"{}")
    await client.tasks.Exec(
        pb.ExecProcessRequest(container_id="c1", exec_id="e1", spec=spec), timeout=10
    )
    await client.tasks.Start(pb.StartRequest(container_id="c1", exec_id="e1"), timeout=10)
    code, _ = await failure(
        client.tasks.Exec(
            pb.ExecProcessRequest(container_id="c1", exec_id="e1", spec=spec), timeout=10
        )
    )
    assert code is grpc.StatusCode.ALREADY_EXISTS
    await shim.exit("e1", 7)
    ended = await client.tasks.Wait(pb.WaitRequest(container_id="c1", exec_id="e1"), timeout=10)
    assert ended.exit_status == 7
    deleted = await client.tasks.DeleteProcess(
        pb.DeleteProcessRequest(container_id="c1", exec_id="e1"), timeout=10
    )
    assert (deleted.id, deleted.exit_status) == ("e1", 7)
    for wrong in ("", "../x", "a" * 77):
        request = pb.ExecProcessRequest(container_id="c1", exec_id=wrong, spec=spec)
        code, _ = await failure(client.tasks.Exec(request, timeout=10))
        assert code is grpc.StatusCode.INVALID_ARGUMENT


async def test_every_method_reaches_the_shim(node: TaskNode, client: TaskClient) -> None:
    shim = await node.running("c1")
    tasks = client.tasks
    await tasks.Pause(pb.PauseTaskRequest(container_id="c1"), timeout=10)
    listed = (await tasks.List(pb.ListTasksRequest(), timeout=10)).tasks
    assert [(task.id, task.status) for task in listed] == [("c1", task_pb2.PAUSED)]
    await tasks.Resume(pb.ResumeTaskRequest(container_id="c1"), timeout=10)
    pids = await tasks.ListPids(pb.ListPidsRequest(container_id="c1"), timeout=10)
    assert [process.pid for process in pids.processes] == [shim.processes[""].pid]
    await tasks.ResizePty(pb.ResizePtyRequest(container_id="c1", width=80, height=25), timeout=10)
    await tasks.CloseIO(pb.CloseIORequest(container_id="c1", stdin=True), timeout=10)
    await tasks.Update(
        pb.UpdateTaskRequest(container_id="c1", resources=AnyMessage(type_url="limits")),
        timeout=10,
    )
    await tasks.Kill(pb.KillRequest(container_id="c1", signal=15), timeout=10)
    figures = (await tasks.Metrics(pb.MetricsRequest(filters=["id==c1"]), timeout=10)).metrics
    assert [(metric.id, metric.data.type_url) for metric in figures] == [("c1", "figures")]
    assert not (await tasks.Metrics(pb.MetricsRequest(filters=["id==c2"]), timeout=10)).metrics
    called = {"Pause", "Resume", "Pids", "ResizePty 80x25", "CloseIO", "Update limits", "Kill"}
    assert called <= set(shim.calls)


@pytest.mark.parametrize("fault", ["factory", "create", "death"])
async def test_a_creation_that_fails_leaves_nothing(
    node: TaskNode, client: TaskClient, fault: str
) -> None:
    await node.container("c1")
    request = pb.CreateTaskRequest(container_id="c1")
    if fault == "factory":
        node.factory.failure = ShimStartFailed("it is on fire")
    elif fault == "create":
        node.factory.prepare = [("faults", {"Create": grpc.StatusCode.INVALID_ARGUMENT})]
    else:
        node.factory.prepare = [("hanging", {"Create"})]
    call = client.tasks.Create(request, timeout=10)
    if fault == "death":
        pending = asyncio.ensure_future(call)
        await (await node.factory.started_shim("c1")).called("Create")
        await node.shim("c1").die()
        call = pending
    code, text = await failure(call)
    expected = {
        "factory": grpc.StatusCode.INTERNAL,
        "create": grpc.StatusCode.INVALID_ARGUMENT,
        "death": grpc.StatusCode.UNAVAILABLE,
    }
    assert code is expected[fault], text
    assert nothing_left(node)
    assert fault == "factory" or not node.shim("c1").alive
    node.factory.failure, node.factory.prepare = None, []
    await client.tasks.Create(request, timeout=10)


async def test_a_shim_that_ended_before_it_answered_is_not_the_last_word(
    node: TaskNode, client: TaskClient
) -> None:
    await node.container("c1")
    node.factory.lines = [False, False]
    created = await client.tasks.Create(pb.CreateTaskRequest(container_id="c1"), timeout=10)
    assert created.pid == node.shim("c1").processes[""].pid
    assert not node.factory.lines


async def test_a_shim_that_refuses_after_it_was_called_says_why(
    node: TaskNode, client: TaskClient
) -> None:
    await node.container("c1")
    node.factory.lines = [ShimStartFailed("the bundle is on fire")]
    code, text = await failure(
        client.tasks.Create(pb.CreateTaskRequest(container_id="c1"), timeout=10)
    )
    assert (code, text) == (grpc.StatusCode.INTERNAL, "the bundle is on fire")
    assert nothing_left(node)


async def test_a_creation_whose_caller_gives_up_is_undone(
    node: TaskNode, client: TaskClient
) -> None:
    await node.container("c1")
    node.factory.prepare = [("hanging", {"Create"})]
    call = client.tasks.Create(pb.CreateTaskRequest(container_id="c1"), timeout=0.3)
    code, _ = await failure(call)
    assert code is grpc.StatusCode.DEADLINE_EXCEEDED
    await node.shims_removed()
    assert nothing_left(node)
    assert not node.shim("c1").alive


async def test_what_cannot_be_created_is_refused(node: TaskNode, client: TaskClient) -> None:
    create = client.tasks.Create
    code, _ = await failure(create(pb.CreateTaskRequest(container_id="none"), timeout=10))
    assert code is grpc.StatusCode.NOT_FOUND
    await node.container("gvisor", runtime="io.containerd.runsc.v1")
    code, text = await failure(create(pb.CreateTaskRequest(container_id="gvisor"), timeout=10))
    assert code is grpc.StatusCode.NOT_FOUND
    assert "io.containerd.runsc.v1" in text
    assert "containerd-shim-runsc-v1" in text
    await node.container("odd", runtime="runc")
    code, _ = await failure(create(pb.CreateTaskRequest(container_id="odd"), timeout=10))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    await node.running("c1")
    code, _ = await failure(create(pb.CreateTaskRequest(container_id="c1"), timeout=10))
    assert code is grpc.StatusCode.ALREADY_EXISTS
    await node.container("c2")
    wrong = AnyMessage(type_url="some.other.Options")
    request = pb.CreateTaskRequest(container_id="c2", options=wrong)
    code, _ = await failure(create(request, timeout=10))
    assert code is grpc.StatusCode.INVALID_ARGUMENT


async def test_errors_of_the_shim_reach_the_client(node: TaskNode, client: TaskClient) -> None:
    shim = await node.running("c1")
    code, text = await failure(
        client.tasks.Delete(pb.DeleteTaskRequest(container_id="c1"), timeout=10)
    )
    assert (code, text) == (grpc.StatusCode.FAILED_PRECONDITION, "process is running")
    assert shim.alive
    code, _ = await failure(
        client.tasks.Kill(pb.KillRequest(container_id="c1", exec_id="no", signal=9), timeout=10)
    )
    assert code is grpc.StatusCode.NOT_FOUND
    async with node.client("other") as stranger:
        code, _ = await failure(stranger.tasks.Get(pb.GetRequest(container_id="c1"), timeout=10))
        assert code is grpc.StatusCode.NOT_FOUND
        assert not (await stranger.tasks.List(pb.ListTasksRequest(), timeout=10)).tasks


async def test_a_list_does_not_wait_for_a_shim_that_hangs(
    node: TaskNode, client: TaskClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.containerd.tasks.manager._STATE_S", 0.2)
    await node.running("good")
    (await node.running("stuck")).hanging.add("State")
    listed = (await client.tasks.List(pb.ListTasksRequest(), timeout=5)).tasks
    assert {task.id: task.status for task in listed} == {
        "good": task_pb2.RUNNING,
        "stuck": task_pb2.UNKNOWN,
    }


async def test_a_list_asks_each_shim_once_for_as_long_as_nothing_happens(
    node: TaskNode, client: TaskClient
) -> None:
    shims = [await node.running(f"c{number}") for number in range(3)]

    async def listed() -> list[task_pb2.Status]:
        answer = await client.tasks.List(pb.ListTasksRequest(), timeout=5)
        return [task.status for task in answer.tasks]

    def asked() -> list[int]:
        return [shim.calls.count("State") for shim in shims]

    assert await listed() == [task_pb2.RUNNING] * 3
    assert await listed() == [task_pb2.RUNNING] * 3
    assert asked() == [1, 1, 1]
    await client.tasks.Pause(pb.PauseTaskRequest(container_id="c0"), timeout=5)
    assert await listed() == [task_pb2.PAUSED, task_pb2.RUNNING, task_pb2.RUNNING]
    waiting = client.tasks.Wait(pb.WaitRequest(container_id="c1"), timeout=5)
    await shims[1].exit("", 3)  # by itself: only its event, or a Wait, tells of it
    await waiting
    assert await listed() == [task_pb2.PAUSED, task_pb2.STOPPED, task_pb2.RUNNING]
    await shims[2].exit("", 0)
    await shims[2].acknowledged(shims[2].last_seq)
    assert (await listed())[2] == task_pb2.STOPPED
    assert all(asked())
    before = asked()
    await listed()
    assert asked() == before


async def test_a_restart_lists_what_shims_say_when_they_come_back(node: TaskNode) -> None:
    shim = await node.running("c1")
    shim.tells_streams = True
    shim.processes[""].request = pb_shim.CreateTaskRequest(stdout="file:///log")
    await node.restart()
    await shim.registered(2)
    before = shim.calls.count("State")
    async with node.client() as client:
        (found,) = (await client.tasks.List(pb.ListTasksRequest(), timeout=5)).tasks
    assert (found.id, found.pid, found.status) == ("c1", shim.processes[""].pid, task_pb2.RUNNING)
    assert found.stdout == "file:///log"
    assert shim.calls.count("State") == before


async def test_two_deletions_are_one(node: TaskNode, client: TaskClient) -> None:
    shim = await node.running("c1")
    await shim.exit("", 3)
    request = pb.DeleteTaskRequest(container_id="c1")
    outcomes = await asyncio.gather(
        *(client.tasks.Delete(request, timeout=10) for _ in range(4)), return_exceptions=True
    )
    answers = [outcome for outcome in outcomes if isinstance(outcome, pb.DeleteResponse)]
    refusals = [outcome for outcome in outcomes if isinstance(outcome, grpc.aio.AioRpcError)]
    assert answers
    assert {answer.exit_status for answer in answers} == {3}
    assert {error.code() for error in refusals} <= {grpc.StatusCode.NOT_FOUND}
    await node.shims_removed()
    assert nothing_left(node)


async def test_a_deletion_does_not_wait_for_the_end_of_the_shim(
    node: TaskNode, client: TaskClient
) -> None:
    shim = await node.running("c1")
    await shim.exit("", 3)
    shim.hanging.add("Shutdown")
    request = pb.DeleteTaskRequest(container_id="c1")
    assert (await client.tasks.Delete(request, timeout=10)).exit_status == 3
    assert shim.alive
    assert (await node.topics())[-1] == "/tasks/delete"
    for call in (
        client.tasks.Delete(request, timeout=10),
        client.tasks.Get(pb.GetRequest(container_id="c1"), timeout=10),
        client.tasks.Wait(pb.WaitRequest(container_id="c1"), timeout=10),
    ):
        assert (await failure(call))[0] is grpc.StatusCode.NOT_FOUND
    listed = await client.tasks.List(pb.ListTasksRequest(), timeout=10)
    assert list(listed.tasks) == []
    await shim.called("Shutdown")
    assert json.loads((shim.bundle / "deleting").read_text()) == {"exit_status": 3, "clean": True}
    await shim.die()
    await node.shims_removed()
    assert nothing_left(node)


async def test_a_new_task_of_the_same_id_waits_for_the_end_of_the_old_one(
    node: TaskNode, client: TaskClient
) -> None:
    old = await node.running("c1")
    await old.exit("", 3)
    old.hanging.add("Shutdown")
    await client.tasks.Delete(pb.DeleteTaskRequest(container_id="c1"), timeout=10)
    creating = asyncio.ensure_future(
        client.tasks.Create(pb.CreateTaskRequest(container_id="c1"), timeout=10)
    )
    await old.called("Shutdown")
    assert not creating.done()
    await old.die()
    created = await creating
    assert node.shim("c1") is not old
    assert created.pid == node.shim("c1").processes[""].pid


async def test_a_checkpoint_is_kept_as_content_and_restored(
    node: TaskNode, client: TaskClient
) -> None:
    await node.running("c1")
    answer = await client.tasks.Checkpoint(pb.CheckpointTaskRequest(container_id="c1"), timeout=10)
    kinds = [descriptor.media_type for descriptor in answer.descriptors]
    assert kinds == [MEDIA_TYPE_STATE, MEDIA_TYPE_SPEC]
    await node.container("c2")
    seen: list[bytes] = []
    node.factory.prepare = [("on_create", seen.append)]
    await client.tasks.Create(
        pb.CreateTaskRequest(container_id="c2", checkpoint=answer.descriptors[0]), timeout=10
    )
    assert seen == [b"state"]
    assert not list((node.root / "scratch").iterdir())
    await node.container("c3")
    wrong = descriptor_pb2.Descriptor(media_type="text/plain", digest="sha256:" + "0" * 64)
    code, _ = await failure(
        client.tasks.Create(pb.CreateTaskRequest(container_id="c3", checkpoint=wrong), timeout=10)
    )
    assert code is grpc.StatusCode.INVALID_ARGUMENT


async def test_an_attach_goes_through_in_both_directions(
    node: TaskNode, client: TaskClient
) -> None:
    await node.running("c1")

    async def requests() -> AsyncIterator[streams_pb2.AttachRequest]:
        yield streams_pb2.AttachRequest(
            start=streams_pb2.AttachStart(container_id="c1", input=True, output=True)
        )
        for piece in (b"one", b"two"):
            yield streams_pb2.AttachRequest(input=streams_pb2.Input(data=piece))
        yield streams_pb2.AttachRequest(close_input=streams_pb2.CloseInput())

    answers = [answer async for answer in client.streams.Attach(requests(), timeout=10)]
    assert [answer.WhichOneof("message") for answer in answers] == [
        "started",
        "output",
        "output",
        "finished",
    ]
    assert b"".join(answer.output.data for answer in answers) == b"onetwo"


async def test_a_stop_ends_what_waits_for_processes_and_it_can_be_asked_again(
    node: TaskNode, client: TaskClient
) -> None:
    shim = await node.running("c1")
    call = client.streams.Attach(timeout=10)
    start = streams_pb2.AttachStart(container_id="c1", output=True)
    await call.write(streams_pb2.AttachRequest(start=start))
    await call.read()
    wait = asyncio.ensure_future(
        failure(client.tasks.Wait(pb.WaitRequest(container_id="c1"), timeout=10))
    )
    node.draining.drain()
    for ended in (failure(call.read()), wait):
        code, sentence = await ended
        assert code is grpc.StatusCode.UNAVAILABLE
        assert "ask again" in sentence
    async with asyncio.timeout(20):
        await shim.detached.wait()
    assert shim.alive


async def test_an_attach_that_is_cancelled_is_cancelled_at_the_shim(
    node: TaskNode, client: TaskClient
) -> None:
    shim = await node.running("c1")
    call = client.streams.Attach(timeout=10)
    start = streams_pb2.AttachStart(container_id="c1", output=True)
    await call.write(streams_pb2.AttachRequest(start=start))
    answer: Any = await call.read()
    assert answer.WhichOneof("message") == "started"
    assert not shim.detached.is_set()
    call.cancel()
    async with asyncio.timeout(20):
        await shim.detached.wait()


async def begin_exec(client: TaskClient, exec_id: str = "e") -> Any:
    """An attach that is to start an exec."""
    call = client.streams.Attach(timeout=10)
    start = streams_pb2.AttachStart(
        container_id="c1", exec_id=exec_id, output=True, process=streams_pb2.NewProcess(spec=b"{}")
    )
    await call.write(streams_pb2.AttachRequest(start=start))
    return call


async def test_an_attach_that_starts_an_exec_is_made_again_if_the_shim_was_away(
    node: TaskNode, client: TaskClient
) -> None:
    shim = await node.running("c1")
    shim.faults["AttachStart"] = grpc.StatusCode.UNAVAILABLE
    call = await begin_exec(client)
    async with asyncio.timeout(20):
        await shim.called("AttachStart")
    del shim.faults["AttachStart"]
    assert (await call.read()).HasField("started")
    await call.write(streams_pb2.AttachRequest(input=streams_pb2.Input(data=b"in")))
    assert (await call.read()).output.data == b"in"
    call.cancel()


async def test_why_an_exec_was_not_started_by_its_attach_is_passed_on(
    node: TaskNode, client: TaskClient
) -> None:
    shim = await node.running("c1")
    shim.faults["AttachStart"] = grpc.StatusCode.FAILED_PRECONDITION
    code, sentence = await failure((await begin_exec(client)).read())
    assert (code, sentence) == (
        grpc.StatusCode.FAILED_PRECONDITION,
        "AttachStart fails on demand",
    )
    code, _ = await failure((await begin_exec(client, "a/b")).read())
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    async with asyncio.timeout(20):
        await shim.detached.wait()


async def test_an_attach_to_nothing_is_refused(node: TaskNode, client: TaskClient) -> None:
    async def requests(message: streams_pb2.AttachRequest) -> AsyncIterator[Any]:
        yield message

    for message, code in (
        (
            streams_pb2.AttachRequest(start=streams_pb2.AttachStart(container_id="no")),
            grpc.StatusCode.NOT_FOUND,
        ),
        (
            streams_pb2.AttachRequest(close_input=streams_pb2.CloseInput()),
            grpc.StatusCode.INVALID_ARGUMENT,
        ),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in client.streams.Attach(requests(message), timeout=10):
                pass
        assert caught.value.code() is code


def test_a_failed_start_is_an_internal_error() -> None:
    assert issubclass(ShimStartFailed, Internal)
