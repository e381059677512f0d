"""The task API over a real socket, with a runtime that fails on demand."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path

import grpc
import pytest
from google.protobuf import any_pb2

from protos.containerd.task.v2 import shim_pb2 as shim_v2_pb2
from protos.containerd.task.v2 import shim_pb2_grpc as v2_grpc
from protos.containerd.task.v3 import shim_pb2
from protos.containerd.types.task import task_pb2
from services.common import errors
from tests.fakes.eventually import eventually
from tests.fakes.shim_harness import plain_spec

SLEEP = ("/bin/sleep", "1000")


async def running(maker, fake, *arguments, **create):
    shim = await maker.start(maker.bundle(plain_spec(*(arguments or SLEEP))))
    await shim.create(binary=fake.path, **create)
    await shim.start()
    return shim


def open_files_of(shim):
    return len(list(Path(f"/proc/{shim.pid}/fd").iterdir()))


async def test_events_come_in_upstreams_order(maker, fake, registry):
    shim = await running(maker, fake)
    await shim.exec("e", ["/bin/sh", "-c", "exit 3"])
    await shim.wait("e")
    await shim.delete("e")
    await shim.call("Pause", shim_pb2.PauseRequest(id=shim.id))
    await shim.call("Resume", shim_pb2.ResumeRequest(id=shim.id))
    await shim.kill()
    await shim.wait()
    await shim.delete()
    await registry.wait_for_topic("/tasks/delete")
    assert registry.topics() == [
        "/tasks/create",
        "/tasks/start",
        "/tasks/exec-added",
        "/tasks/exec-started",
        "/tasks/exit",
        "/tasks/paused",
        "/tasks/resumed",
        "/tasks/exit",
        "/tasks/delete",
    ]
    create = registry.of("/tasks/create")[0].message
    assert (create.container_id, create.bundle) == (shim.id, str(shim.bundle))
    last = registry.of("/tasks/exit")[1].message
    assert (last.id, last.exit_status) == (shim.id, 137)


async def test_start_is_told_before_the_exit_of_a_process_that_ends_at_once(maker, fake, registry):
    for _ in range(5):
        shim = await running(maker, fake, "/bin/true")
        await shim.wait()
    await registry.wait_for(lambda r: len(r.of("/tasks/exit")) == 5)
    for event in registry.of("/tasks/exit"):
        mine = [e.topic for e in registry.events if e.instance == event.instance]
        assert mine == ["/tasks/create", "/tasks/start", "/tasks/exit"]


async def test_second_name_of_the_api_serves_the_same(maker, fake):
    shim = await running(maker, fake)
    stub = v2_grpc.TaskStub(shim.channel)
    answer = await stub.State(shim_pb2.StateRequest(id=shim.id), timeout=10)
    assert answer.status == task_pb2.RUNNING
    connected = await stub.Connect(shim_pb2.ConnectRequest(id=shim.id), timeout=10)
    assert (connected.shim_pid, connected.task_pid) == (shim.pid, answer.pid)


@pytest.mark.parametrize("descriptor", [shim_v2_pb2.DESCRIPTOR, shim_pb2.DESCRIPTOR])
async def test_every_call_of_the_api_is_served_under_both_names(maker, descriptor):
    """Of a task that nobody knows; those that need none answer."""
    shim = await maker.start(maker.bundle(plain_spec(*SLEEP)))
    service = descriptor.services_by_name["Task"]
    answered = {}
    for method in service.methods:
        call = shim.channel.unary_unary(
            f"/{service.full_name}/{method.name}",
            request_serializer=type(shim_pb2.StateRequest()).SerializeToString,
        )
        try:
            await call(shim_pb2.StateRequest(), timeout=20)
            answered[method.name] = "OK"
        except grpc.aio.AioRpcError as error:
            answered[method.name] = error.code().name
    assert len(answered) == 17
    assert {name for name, code in answered.items() if code == "OK"} == {"Connect", "Shutdown"}
    assert answered.pop("Create") == "INVALID_ARGUMENT"
    assert set(answered.values()) == {"OK", "NOT_FOUND"}


async def test_each_metric_counts_what_it_is_named_for(maker, fake, registry, tmp_path):
    log = f"theseus-log://{tmp_path}/c.log"
    shim = await maker.start(
        maker.bundle(plain_spec("sh", "-c", "echo one; echo two; echo e >&2; exec sleep 1000"))
    )
    await shim.create(binary=fake.path, stdout=log, stderr=log)
    await shim.start()
    for exec_id in ("e", "f"):
        await shim.exec(exec_id, ["true"])
        await shim.wait(exec_id)
    await registry.wait_for(lambda r: len(r.of("/tasks/exit")) == 2)
    wanted = {
        "theseus_shim_create_seconds_count": 1,
        "theseus_shim_start_seconds_count": 1,
        "theseus_shim_exec_seconds_count": 2,
        'theseus_shim_output_bytes_total{stream="stdout"}': 8,
        'theseus_shim_output_bytes_total{stream="stderr"}': 2,
        'theseus_shim_output_lines_total{stream="stdout"}': 2,
        'theseus_shim_output_lines_total{stream="stderr"}': 1,
        'theseus_shim_dropped_bytes_total{stream="stdout"}': 0,
        "theseus_shim_zombies_reaped": 0,
        "theseus_shim_spool_length": 0,
        "theseus_shim_spool_write_failures_total": 0,
        "theseus_shim_generation": 0,
        "theseus_shim_registrations_total": 1,
        "theseus_shim_registered": 1,
        "theseus_shim_refused_epochs_total": 0,
        "theseus_shim_containers": 1,
    }

    async def counted():
        lines = (await shim.metrics()).splitlines()
        found = dict(line.rsplit(" ", 1) for line in lines if line[0] != "#")
        calls = 'grpc_server_handled_total{grpc_code="OK",grpc_method="Wait",'
        calls += 'grpc_service="containerd.task.v3.Task",grpc_type="unary"}'
        assert float(found[calls]) == 2
        return {name: float(found[name]) for name in wanted} == wanted

    await eventually(counted)
    await shim.reexec()
    assert "theseus_shim_generation 1" in await shim.metrics()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("start", errors.FailedPrecondition),
        ("delete", errors.FailedPrecondition),
        ("create", errors.AlreadyExists),
        ("Resume", errors.FailedPrecondition),
        ("ResizePty", errors.FailedPrecondition),
    ],
)
async def test_what_a_running_container_refuses(maker, fake, name, kind):
    shim = await running(maker, fake)
    requests = {
        "Resume": shim_pb2.ResumeRequest(id=shim.id),
        "ResizePty": shim_pb2.ResizePtyRequest(id=shim.id, width=1, height=1),
    }
    with pytest.raises(kind) as caught:
        if name in requests:
            await shim.call(name, requests[name])
        else:
            await getattr(shim, name)()
    assert shim.id in caught.value.message
    assert (await shim.state()).status == task_pb2.RUNNING


async def test_unknown_names_are_not_found(maker, fake):
    shim = await running(maker, fake)
    for call in (
        shim.state("x"), shim.start("x"), shim.wait("x"), shim.kill(exec_id="x"), shim.delete("x"),
        shim.call("Pids", shim_pb2.PidsRequest(id="other")),
        shim.call("CloseIO", shim_pb2.CloseIORequest(id=shim.id, exec_id="x", stdin=True)),
        shim.call("ResizePty", shim_pb2.ResizePtyRequest(id=shim.id, exec_id="x")),
    ):  # fmt: skip
        with pytest.raises(errors.NotFound):
            await call


async def test_exited_container_answers_until_it_is_deleted(maker, fake):
    shim = await running(maker, fake, "/bin/sh", "-c", "exit 5")
    await shim.wait()
    state = await shim.state()
    assert (state.status, state.exit_status) == (task_pb2.STOPPED, 5)
    pids = await shim.call("Pids", shim_pb2.PidsRequest(id=shim.id))
    assert [process.pid for process in pids.processes] == [state.pid]
    with pytest.raises(errors.NotFound, match="process already finished"):
        await shim.kill()
    with pytest.raises(errors.FailedPrecondition):
        await shim.exec("e", ["/bin/true"])
    with pytest.raises(errors.NotFound):
        await shim.call("Stats", shim_pb2.StatsRequest(id=shim.id))
    assert (await shim.delete()).exit_status == 5
    with pytest.raises(errors.NotFound):
        await shim.state()


async def test_exit_record_holds_what_is_known(maker, fake):
    shim = await running(maker, fake, "/bin/sh", "-c", "kill -TERM $$")
    assert (await shim.wait()).exit_status == 143
    fields = json.loads((shim.bundle / "spool" / "3").read_text())["fields"]
    assert (fields["exit_status"], fields["signal"], fields["oom_killed"]) == (143, 15, False)
    assert set(fields["usage"]) == {"user_us", "system_us", "max_rss_bytes"}
    process = json.loads((shim.bundle / "state.json").read_text())["containers"][0]["processes"][0]
    assert (process["status"], process["exit_status"]) == ("stopped", 143)


async def test_exec_ids_are_unique_and_specs_are_checked(maker, fake):
    shim = await running(maker, fake)
    await shim.exec("e", ["/bin/sleep", "1000"])
    with pytest.raises(errors.AlreadyExists):
        await shim.exec("e", ["/bin/true"])
    for exec_id in ("", "a/b", "..", "x" * 200):
        with pytest.raises(errors.InvalidArgument):
            await shim.exec(exec_id, ["/bin/true"])
    for value in (b"", b"[]", b"\xff"):
        request = shim_pb2.ExecProcessRequest(
            id=shim.id, exec_id="bad", spec=any_pb2.Any(value=value)
        )
        with pytest.raises(errors.InvalidArgument):
            await shim.call("Exec", request)
    with pytest.raises(errors.FailedPrecondition):
        await shim.delete("e")
    await shim.kill(exec_id="e")
    assert (await shim.wait("e")).exit_status == 137
    await shim.delete("e")
    await shim.exec("e", ["/bin/true"])  # the name is free again


async def test_execs_run_side_by_side_and_end_before_init_is_told(maker, fake, registry):
    shim = await running(maker, fake)
    await asyncio.gather(*(shim.exec(f"e{n}", ["/bin/sleep", "1000"]) for n in range(4)))
    pids = {(await shim.state(f"e{n}")).pid for n in range(4)}
    assert len(pids) == 4
    await shim.kill()
    # The fake has no pid namespace: what the kernel would do is done here.
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    await shim.wait()
    await registry.wait_for(lambda r: len(r.of("/tasks/exit")) == 5)
    assert registry.of("/tasks/exit")[-1].message.id == shim.id


@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [
        ({"message": "no cgroup for you"}, errors.FailedPrecondition, "no cgroup for you"),
        ({"die": 11, "message": "tail"}, errors.Internal, "signal 11; its last words: tail"),
        ({"hang": True}, errors.Internal, "did not answer in time"),
        ({"garbage": 10_000}, errors.FailedPrecondition, "exited with 1"),
        # Nobody reads a container's pipes before there is one: the runtime fills them, and hangs.
        ({"garbage": 500_000}, errors.Internal, "did not answer in time"),
        ({"lie": "no-pid"}, errors.Internal, "without writing"),
        ({"lie": "bad-pid"}, errors.Internal, "wrote no process id"),
        (
            {"message": 'exec: "x": executable file not found in $PATH'},
            errors.InvalidArgument,
            "not found",
        ),
    ],
)
async def test_create_that_fails_leaves_nothing_and_can_be_repeated(
    maker, fake, registry, *, fault, kind, words
):
    shim = await maker.start(maker.bundle(plain_spec(*SLEEP)), runtime_timeout_s=1.5)
    fake.fail("create", **fault)
    await registry.wait_for(lambda r: r.hellos)
    await shim.info()  # from here on its connections stand
    await shim.call("Connect", shim_pb2.ConnectRequest(id=shim.id))
    open_files = open_files_of(shim)
    with pytest.raises(kind, match=words):
        await shim.create(binary=fake.path, stdout="theseus-stream:", stdin="theseus-stream:")
    assert open_files_of(shim) == open_files
    assert registry.topics() == []
    with pytest.raises(errors.NotFound):
        await shim.state()
    fake.heal("create")
    await shim.create(binary=fake.path)
    await shim.start()
    assert (await shim.state()).status == task_pb2.RUNNING


async def test_start_that_fails_leaves_the_container_created(maker, fake):
    shim = await maker.start(maker.bundle(plain_spec(*SLEEP)))
    await shim.create(binary=fake.path)
    fake.fail("start", message="not today")
    with pytest.raises(errors.FailedPrecondition, match="not today"):
        await shim.start()
    assert (await shim.state()).status == task_pb2.CREATED
    fake.heal("start")
    await shim.start()
    assert (await shim.state()).status == task_pb2.RUNNING


async def test_exec_that_fails_can_be_started_again_or_deleted(maker, fake):
    shim = await running(maker, fake)
    fake.fail("exec", message="exec failed: permission denied")
    with pytest.raises(errors.InvalidArgument) as caught:
        await shim.exec("e", ["/bin/true"], stdout="theseus-stream:")
    assert caught.value.reason == "COMMAND_NOT_EXECUTABLE"
    assert (await shim.state("e")).status == task_pb2.CREATED
    waiting = asyncio.create_task(shim.wait("e"))
    fake.heal("exec")
    await shim.start("e")
    assert (await waiting).exit_status == 0
    with pytest.raises(errors.FailedPrecondition):
        await shim.start("e")
    assert not list(shim.bundle.glob("exec-*"))


async def test_pause_that_fails_changes_nothing(maker, fake):
    shim = await running(maker, fake)
    fake.fail("pause", message="frozen solid")
    with pytest.raises(errors.FailedPrecondition, match="frozen solid"):
        await shim.call("Pause", shim_pb2.PauseRequest(id=shim.id))
    assert (await shim.state()).status == task_pb2.RUNNING


async def ended(maker, fake, status, **more):
    """A shim whose container has ended; the spec has ``more``."""
    spec = {**plain_spec("/bin/sh", "-c", f"exit {status}"), **more}
    shim = await maker.start(maker.bundle(spec))
    await shim.create(binary=fake.path)
    await shim.start()
    assert (await shim.wait()).exit_status == status
    return shim


def recorded(shim):
    """Status of each container's init in the state file, by id."""
    state = json.loads((shim.bundle / "state.json").read_text())
    return {each["id"]: each["processes"][0]["status"] for each in state["containers"]}


async def test_delete_does_not_wait_for_the_runtime(maker, fake, registry):
    fake.hold("delete")
    shim = await ended(maker, fake, 6)
    assert (await shim.delete()).exit_status == 6
    await registry.wait_for_topic("/tasks/delete")
    with pytest.raises(errors.NotFound):
        await shim.state()
    assert recorded(shim) == {shim.id: "deleted"}
    await shim.shutdown()
    await shim.call("Shutdown", shim_pb2.ShutdownRequest(id=shim.id, now=True))
    with pytest.raises(TimeoutError):
        await shim.ended(limit_s=0.2)
    fake.release("delete")
    await shim.ended()
    assert recorded(shim) == {}
    assert [call for call in fake.calls() if call[0] == "delete"] == [["delete", shim.id]]


async def test_a_container_of_the_same_name_waits_for_the_runtime(maker, fake):
    fake.hold("delete")
    shim = await ended(maker, fake, 0)
    await shim.delete()
    creating = asyncio.create_task(shim.create(binary=fake.path))
    await asyncio.sleep(0.1)
    assert fake.calls()[-1][0] == "delete"
    fake.release("delete")
    await creating
    assert recorded(shim) == {shim.id: "created"}


async def test_what_the_runtime_does_not_delete_is_tried_again_and_stays_on_record(
    maker, fake, registry
):
    fake.fail("delete", message="busy")
    fake.hold("delete")
    shim = await ended(maker, fake, 6)
    assert (await shim.delete()).exit_status == 6
    fake.release("delete")
    await shim.shutdown()
    await shim.ended()
    deletions = [call for call in fake.calls() if call[0] == "delete"]
    assert deletions == [["delete", shim.id], ["delete", "--force", shim.id]]
    assert recorded(shim) == {shim.id: "deleted"}
    assert "busy" in (shim.bundle / "shim.log").read_text()


async def test_delete_repeats_what_has_failed_by_then(maker, fake, registry):
    fake.fail("delete", message="busy")
    shim = await ended(maker, fake, 6)
    await eventually(lambda: "busy" in (shim.bundle / "shim.log").read_text())
    with pytest.raises(errors.FailedPrecondition, match="busy"):
        await shim.delete()
    assert (await shim.state()).status == task_pb2.STOPPED
    fake.heal("delete")
    assert (await shim.delete()).exit_status == 6
    assert recorded(shim) == {}


async def test_delete_waits_for_a_runtime_that_has_hooks_to_run(maker, fake, registry):
    fake.hold("delete")
    fake.fail("delete", message="busy")
    shim = await ended(maker, fake, 6, hooks={"poststop": [{"path": "/bin/true"}]})
    deleting = asyncio.create_task(shim.delete())
    await eventually(lambda: fake.calls()[-1][0] == "delete")
    assert not deleting.done()
    fake.release("delete")
    with pytest.raises(errors.FailedPrecondition, match="busy"):
        await deleting
    assert (await shim.state()).status == task_pb2.STOPPED
    fake.heal("delete")
    assert (await shim.delete()).exit_status == 6
    await registry.wait_for_topic("/tasks/delete")


async def test_client_that_gives_up_leaves_no_half_created_container(maker, fake):
    shim = await maker.start(maker.bundle(plain_spec(*SLEEP)))
    await shim.create(binary=fake.path)
    call = shim.task.Start(shim_pb2.StartRequest(id=shim.id), timeout=20)

    async def begun():
        return fake.calls()[-1][0] == "start"

    await eventually(begun)
    call.cancel()

    async def runs():
        return (await shim.state()).status == task_pb2.RUNNING

    await eventually(runs)


async def test_update_hands_the_resources_to_the_runtime(maker, fake):
    shim = await running(maker, fake)
    request = shim_pb2.UpdateTaskRequest(id=shim.id, resources=any_pb2.Any(value=b'{"pids":{}}'))
    await shim.call("Update", request)
    assert fake.calls()[-1][0] == "update"
    request.resources.value = b"no json"
    with pytest.raises(errors.InvalidArgument):
        await shim.call("Update", request)


async def test_bundle_that_is_not_there_or_has_no_spec_is_told(maker, fake):
    shim = await maker.start(maker.bundle(plain_spec(*SLEEP)))
    (shim.bundle / "config.json").unlink()
    with pytest.raises(errors.FailedPrecondition, match=r"config\.json"):
        await shim.create(binary=fake.path)
    for options in (
        any_pb2.Any(type_url="containerd.runc.v1.Options", value=b"\xff\xff"),
        any_pb2.Any(type_url="other.Options", value=b""),
    ):
        with pytest.raises(errors.InvalidArgument):
            await shim.create(options=options)
    with pytest.raises(errors.InvalidArgument, match="neither a program's name"):
        await shim.create(binary="../evil")


@pytest.mark.parametrize(
    ("streams", "kind"),
    [
        ({"stdout": "ftp://x/y"}, errors.InvalidArgument),
        ({"stdin": "file:///x"}, errors.InvalidArgument),
        ({"stdin": "/no/such/fifo"}, errors.FailedPrecondition),
        ({"stdout": "/no/such/fifo"}, errors.FailedPrecondition),
        ({"stdout": "theseus-log:///dev/null/x"}, errors.FailedPrecondition),
        ({"stdout": "binary:///no/such/logger"}, errors.FailedPrecondition),
    ],
)
async def test_streams_that_cannot_be_opened_are_told_before_anything_runs(
    maker, fake, streams, kind
):
    shim = await maker.start(maker.bundle(plain_spec(*SLEEP)))
    with pytest.raises(kind) as caught:
        await shim.create(binary=fake.path, **streams)
    assert caught.value.message
    assert fake.calls() == []


async def test_orphans_are_reaped_and_counted(maker, fake):
    shim = await running(maker, fake, "/bin/sh", "-c", "(sleep 0.01 &) ; sleep 1000")

    async def counted():
        return "theseus_shim_zombies_reaped 1.0" in await shim.metrics()

    await eventually(counted)


async def test_deleted_bundle_does_not_stop_a_shim_from_ending(maker, fake):
    shim = await running(maker, fake, "/bin/true")
    await shim.wait()
    for path in sorted(shim.bundle.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    shim.bundle.rmdir()
    await shim.delete()
    await shim.shutdown(now=True)
    await shim.ended()
    assert not Path(shim.request["socket"]).exists()
