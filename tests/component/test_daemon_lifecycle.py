"""The daemon over its socket, with a pretended containerd: the life of containers."""

from __future__ import annotations

import asyncio
import dataclasses

import grpc
import pytest

from protos.containerd.events import task_pb2
from protos.containerd.types.task.task_pb2 import PAUSED as TASK_PAUSED
from protos.theseus.engine.v1 import containers_pb2 as pb
from protos.theseus.engine.v1 import images_pb2, system_pb2
from services.common.rpc_errors import from_rpc_error
from services.daemon.containers import caretaker
from tests.fakes.engine import NOTHING, engine

CREATED, RUNNING, EXITED = (
    pb.CONTAINER_STATE_CREATED,
    pb.CONTAINER_STATE_RUNNING,
    pb.CONTAINER_STATE_EXITED,
)
NEXT_EXIT = pb.WaitContainerRequest.CONDITION_NEXT_EXIT
REMOVED = pb.WaitContainerRequest.CONDITION_REMOVED


@pytest.fixture
async def made():
    async with engine() as running:
        yield running


async def test_a_container_is_created_started_and_ends(made):
    identity = await made.create("web", network_mode="none", command=["sleep", "1"])
    assert (await made.get("web")).state == CREATED
    await made.begin("web")
    running = await made.get(identity[:6])
    assert running.state == RUNNING
    assert running.pid == made.node.world.process(identity).pid
    assert list(running.args) == ["sleep", "1"]
    waiting = asyncio.create_task(made.wait("web"))
    made.node.world.end(identity, 42)
    status = await waiting
    assert (status.code, status.lost, status.error) == (42, False, "")
    ended = await made.get("web")
    assert (ended.state, ended.pid, ended.exit.code) == (EXITED, 0, 42)


async def test_the_task_gets_log_stdin_runtime_and_configuration(made):
    identity = await made.run("one", open_stdin=True, env=["A=1"], user="bob")
    process = made.node.world.process(identity)
    log_path = (await made.get("one")).log_path
    assert process.stdio == (
        "theseus-stream:",
        f"theseus-log://{log_path}?format=json-file",
        f"theseus-log://{log_path}?format=json-file",
    )
    record = made.node.world.containers[identity]
    assert record.runtime.name == "io.containerd.runc.v2"
    assert str(made.directory / "runc").encode() in record.runtime.options.value
    assert b'"A=1"' in record.spec.value
    assert b'"uid": 1000' in record.spec.value
    assert "containerd.io/gc.root" in made.node.world.snapshots[identity]


async def test_a_bridged_container_has_address_ports_and_names(made):
    identity = await made.run("one", ports=[pb.PortMapping(container_port=80)])
    found = await made.get("one")
    assert found.networks[0].ip_address == "10.77.0.2"
    assert found.ports[0].host_port == 49153
    hosts = (made.config.root / "containers" / identity / "hosts").read_text()
    assert f"10.77.0.2\t{identity[:12]}" in hosts
    made.node.world.end(identity, 0)
    await made.wait("one")
    # Whoever was told of the end finds address and ports free.
    assert made.network.attached() == []
    assert not (await made.get("one")).ports


async def test_removal_leaves_nothing(made):
    identity = await made.run("one", mounts=[pb.Mount(type=pb.Mount.TYPE_VOLUME, target="/data")])
    volume = (await made.get("one")).mounts[0]
    assert (made.directory / volume.source / "file").read_text() == "of the image"
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await made.remove("one")
    assert refused.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert "Stop the container before" in refused.value.details()
    await made.remove("one", force=True, volumes=True)
    assert (made.left()["network"], made.left()["volumes"]) == ([], [])
    assert await made.list_all() == []
    await made.until(lambda: made.left() == NOTHING)
    # The answer stays known.
    status = await made.wait(identity)
    assert status.code == 137
    assert (await made.wait("one", REMOVED)).code == 137


async def test_auto_remove_answers_those_who_wait_for_the_removal(made):
    identity = await made.run("one", auto_remove=True, network_mode="none")
    waiting = asyncio.create_task(made.wait("one", REMOVED))
    made.node.world.end(identity, 3)
    assert (await waiting).code == 3
    await made.until(lambda: made.left() == NOTHING)


async def test_a_removal_answers_before_what_nobody_sees_is_gone(made):
    identity = await made.run("one", network_mode="none")
    made.node.world.end(identity, 3)
    await made.wait("one")
    deleting = made.node.block("Tasks.Delete")
    await made.remove("one")
    for reference in ("one", identity, identity[:12]):
        with pytest.raises(grpc.aio.AioRpcError) as unknown:
            await made.get(reference)
        assert unknown.value.code() == grpc.StatusCode.NOT_FOUND
    assert await made.list_all() == []
    assert (await made.wait(identity, REMOVED)).code == 3
    with pytest.raises(grpc.aio.AioRpcError) as unknown:
        await made.remove(identity)
    assert unknown.value.code() == grpc.StatusCode.NOT_FOUND
    await made.run("one", network_mode="none")  # its name is free
    assert identity in made.left()["snapshots"]
    deleting.set()
    await made.until(lambda: identity not in made.left()["files"])
    assert [container.name for container in await made.list_all()] == ["one"]


async def test_a_removal_does_not_wait_for_the_time_that_clients_have_to_come_back(made):
    await made.stop()
    made.config = dataclasses.replace(made.config, return_grace_s=3600)
    await made.start()
    identity = await made.run("one", network_mode="none")
    made.node.world.end(identity, 3)
    await made.wait("one")
    await made.remove("one")
    await made.until(lambda: made.left() == NOTHING)


async def test_who_removes_faster_than_can_be_removed_is_held_up(made, monkeypatch):
    monkeypatch.setattr(caretaker, "_BEHIND_MAX", 1)
    first, second = await made.create("one"), await made.create("two")
    removing = made.node.block("Snapshots.Remove")
    await made.remove("one")
    waiting = asyncio.create_task(made.remove("two"))
    await made.node.called("Snapshots.Remove", 2)
    assert not waiting.done()
    removing.set()
    await waiting
    assert second not in made.left()["snapshots"]
    await made.until(lambda: first not in made.left()["snapshots"])


async def test_next_exit_is_waited_for_before_a_start(made):
    identity = await made.create("one", network_mode="none")
    assert not (await made.wait("one")).HasField("finished_at")  # it never ran
    waiting = asyncio.create_task(made.wait("one", NEXT_EXIT))
    await made.begin("one")
    assert not waiting.done()
    made.node.world.end(identity, 7)
    assert (await waiting).code == 7


async def test_a_container_can_be_started_again(made):
    identity = await made.run("one")
    made.node.world.end(identity, 1)
    await made.wait("one")
    await made.begin("one")
    assert (await made.get("one")).state == RUNNING
    assert not (await made.get("one")).HasField("exit")
    made.node.world.end(identity, 2)
    assert (await made.wait("one")).code == 2


async def test_where_the_root_lies_is_asked_once_it_is_not_known(made):
    asked = made.node.calls
    identity = await made.run("one", network_mode="none")
    await made.create("two", network_mode="none")
    assert asked.count("Snapshots.Mounts") == 0
    made.node.world.end(identity, 0)
    await made.wait("one")
    await made.begin("one")
    assert asked.count("Snapshots.Mounts") == 1
    await made.restart()
    await made.begin("two")
    assert asked.count("Snapshots.Mounts") == 2


async def test_stop_asks_then_kills(made):
    identity = await made.run("one", network_mode="none", stop_signal="SIGINT")
    request = pb.StopContainerRequest(container="one")
    request.timeout.FromMilliseconds(50)
    await made.containers.Stop(request, timeout=20)
    assert [signal for _, _, signal in made.node.world.signals] == [2, 9]
    assert (await made.wait(identity)).code == 137
    await made.containers.Stop(request, timeout=20)  # not running: nothing to do
    made.node.world.killed_by.add(15)
    await made.begin("one")
    await made.containers.Kill(pb.KillContainerRequest(container="one", signal="TERM"), timeout=20)
    assert (await made.wait(identity)).code == 143
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await made.containers.Kill(pb.KillContainerRequest(container="one"), timeout=20)
    assert refused.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert "is not running" in refused.value.details()


@pytest.mark.parametrize(
    ("reason", "code"), [("COMMAND_NOT_FOUND", 127), ("COMMAND_NOT_EXECUTABLE", 126)]
)
async def test_a_command_that_cannot_run_is_named_and_leaves_nothing_running(made, reason, code):
    identity = await made.create("one")
    waiting = asyncio.create_task(made.wait("one", NEXT_EXIT))
    made.node.fail("Tasks.Create", grpc.StatusCode.INVALID_ARGUMENT, "exec: nosuch", reason=reason)
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await made.begin("one")
    error = from_rpc_error(failed.value)
    assert (failed.value.code(), error.reason) == (grpc.StatusCode.INVALID_ARGUMENT, reason)
    assert (await waiting).code == code
    found = await made.get("one")
    assert (found.state, found.exit.code, found.exit.error) == (EXITED, code, "exec: nosuch")
    left = made.left()
    assert (left["tasks"], left["records"], left["network"]) == ([], [], [])
    assert left["snapshots"] == [identity]


async def test_a_failed_start_of_a_container_made_for_one_run_removes_it(made):
    identity = await made.create("one", auto_remove=True)
    made.node.fail("Tasks.Start", grpc.StatusCode.INTERNAL, "runtime broke")
    with pytest.raises(grpc.aio.AioRpcError):
        await made.begin("one")
    assert (await made.wait(identity, REMOVED)).code == 128
    await made.until(lambda: made.left() == NOTHING)


async def test_a_port_in_use_fails_the_start(made):
    await made.create("one", ports=[pb.PortMapping(container_port=80, host_port=80)])
    made.network.refuse = "Bind for 0.0.0.0:80 failed: port is already allocated"
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await made.begin("one")
    assert failed.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert "port is already allocated" in failed.value.details()
    made.network.refuse = ""
    await made.begin("one")
    assert (await made.get("one")).state == RUNNING


async def test_an_exit_during_the_start_is_the_exit_of_that_start(made):
    identity = await made.create("one", network_mode="none")
    blocked = made.node.block("Tasks.Start")
    starting = asyncio.create_task(made.begin("one"))
    await made.node.called("Tasks.Start")
    made.node.world.process(identity).status = 2
    made.node.world.end(identity, 5)
    journaled = len(made.node.world.journal)
    follower = made.app._follower
    await made.until(lambda: follower._next_seq > journaled)
    assert (await made.get("one")).state == CREATED  # the start decides what the end means
    made.node.world.process(identity).status = 1
    blocked.set()
    await starting
    assert (await made.wait("one")).code == 5


@pytest.mark.parametrize(
    ("fields", "code", "words"),
    [
        ({"image": "No Such"}, "INVALID_ARGUMENT", "invalid reference format"),
        ({"image": "absent:1"}, "NOT_FOUND", "No such image: absent:1"),
        ({"image": ""}, "INVALID_ARGUMENT", "image is needed"),
        ({"network_mode": "moon"}, "INVALID_ARGUMENT", "network moon not found"),
        ({"runtime": "runx"}, "INVALID_ARGUMENT", "unknown or invalid runtime name: runx"),
        ({"runtime": "absent"}, "FAILED_PRECONDITION", "there is no program"),
        ({"stop_signal": "SIGNOT"}, "INVALID_ARGUMENT", "invalid signal: SIGNOT"),
        ({"working_dir": "relative"}, "INVALID_ARGUMENT", "relative"),
        ({"env": ["=x"]}, "INVALID_ARGUMENT", ""),
        ({"cap_add": ["FLY"]}, "INVALID_ARGUMENT", "CAP_FLY"),
        ({"security_opt": ["magic=1"]}, "INVALID_ARGUMENT", "magic"),
        ({"hostname": "a b"}, "INVALID_ARGUMENT", "invalid hostname"),
        ({"resources": pb.Resources(memory_bytes=1)}, "INVALID_ARGUMENT", "6MB"),
        ({"resources": pb.Resources(nano_cpus=-1)}, "INVALID_ARGUMENT", "negative"),
        ({"mounts": [pb.Mount(target="/x")]}, "INVALID_ARGUMENT", "no known type"),
        (
            {"mounts": [pb.Mount(type=pb.Mount.TYPE_BIND, source="/nonexistent", target="/x")]},
            "INVALID_ARGUMENT",
            "bind source path does not exist",
        ),
        (
            {"mounts": [pb.Mount(type=pb.Mount.TYPE_VOLUME, source="!", target="/x")]},
            "INVALID_ARGUMENT",
            "",
        ),
        ({"ports": [pb.PortMapping(container_port=0)]}, "INVALID_ARGUMENT", ""),
    ],
)
async def test_bad_requests_are_refused_and_leave_nothing(made, fields, code, words):
    chosen = pb.ContainerConfig(**{"image": "busybox", **fields})
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await made.containers.Create(pb.CreateContainerRequest(config=chosen), timeout=20)
    assert refused.value.code().name == code
    assert words in refused.value.details()
    assert made.left() == NOTHING
    assert await made.list_all() == []


async def test_names_are_checked_and_belong_to_one(made):
    first = await made.create("/web")
    with pytest.raises(grpc.aio.AioRpcError) as taken:
        await made.create("web")
    assert taken.value.code() == grpc.StatusCode.ALREADY_EXISTS
    assert taken.value.details().startswith(
        f'Conflict. The container name "/web" is already in use by container "{first}"'
    )
    for bad in ("-x", "a", "a b", "é"):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await made.create(bad)
        assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    with pytest.raises(grpc.aio.AioRpcError) as unknown:
        await made.get("nobody")
    assert unknown.value.code() == grpc.StatusCode.NOT_FOUND
    assert unknown.value.details() == "No such container: nobody"
    assert len(await made.list_all()) == 1


async def test_an_image_that_is_not_unpacked_is_said_to_be_so(made):
    made.node.world.committed.clear()
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await made.create()
    assert refused.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert "is not unpacked" in refused.value.details()
    assert made.left() == NOTHING


async def test_lists_show_what_runs_newest_first(made):
    first = await made.run("first", network_mode="none")
    second = await made.create("second", network_mode="none")
    assert [c.id for c in await made.list_all()] == [second, first]
    assert [c.id for c in await made.list_all(stopped=False)] == [first]


async def test_an_oom_is_told(made):
    identity = await made.run("one", network_mode="none")
    made.node.world.note("/tasks/oom", task_pb2.TaskOOM(container_id=identity))
    made.node.world.end(identity, 137)
    status = await made.wait("one")
    assert (status.code, status.oom_killed) == (137, True)


async def test_pause_and_resume_by_others_are_seen(made):
    identity = await made.run("one", network_mode="none")
    made.node.world.note("/tasks/paused", task_pb2.TaskPaused(container_id=identity))
    store = made.app._below.store
    await made.until(lambda: store.get(identity).state == "paused")
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await made.begin("one")
    assert "unpause" in refused.value.details()
    made.node.world.note("/tasks/resumed", task_pb2.TaskResumed(container_id=identity))
    await made.until(lambda: store.get(identity).state == "running")


async def test_a_paused_container_is_killed(made):
    identity = await made.run("one", network_mode="none")
    made.node.world.process(identity).status = TASK_PAUSED
    made.node.world.note("/tasks/paused", task_pb2.TaskPaused(container_id=identity))
    store = made.app._below.store
    await made.until(lambda: store.get(identity).state == "paused")
    await made.remove("one", force=True)
    assert (await made.wait(identity)).code == 137


async def test_images_in_use_are_kept(made):
    await made.create("one", network_mode="none")
    request = images_pb2.RemoveImageRequest(image="busybox")
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await made.images.Remove(request, timeout=20)
    assert refused.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert "must be forced" in refused.value.details()
    await made.remove("one")
    removed = await made.images.Remove(request, timeout=20)
    assert list(removed.untagged) == ["docker.io/library/busybox:latest"]
    assert len(removed.deleted) == 1


async def test_volumes_in_use_are_kept(made):
    mount = pb.Mount(type=pb.Mount.TYPE_VOLUME, source="mine", target="/data")
    await made.create("one", mounts=[mount])
    listed = await made.volumes.List(system_pb2.ListVolumesRequest(), timeout=20)
    assert [volume.name for volume in listed.volumes] == ["mine"]
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await made.volumes.Remove(system_pb2.RemoveVolumeRequest(name="mine"), timeout=20)
    assert refused.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    await made.remove("one", volumes=True)  # a named volume stays
    await made.volumes.Remove(system_pb2.RemoveVolumeRequest(name="mine"), timeout=20)
    await made.until(lambda: made.left() == NOTHING)


async def test_version_info_and_metrics(made):
    version = await made.system.Version(system_pb2.VersionRequest(), timeout=20)
    assert version.containerd == "fake"
    identity = await made.run("one", network_mode="none")
    made.node.world.end(identity, 1)
    await made.wait("one")
    info = await made.system.Info(system_pb2.InfoRequest(), timeout=20)
    assert (info.containers, info.running, info.images) == (1, 0, 1)
    assert info.containerd_ready
    runtimes = {runtime.name: runtime for runtime in info.runtimes}
    assert runtimes["runc"].usable
    assert "there is no program" in runtimes["absent"].reason
    reader, writer = await asyncio.open_unix_connection(made.directory / "m.sock")
    writer.write(b"GET /metrics HTTP/1.1\r\n\r\n")
    page = (await reader.read()).decode()
    writer.close()
    await writer.wait_closed()
    assert 'theseus_daemon_containers{state="exited"} 1.0' in page
    assert 'theseus_daemon_container_exits_total{outcome="nonzero"} 1.0' in page
    assert "theseus_daemon_containerd_connected 1.0" in page
    assert 'theseus_daemon_action_seconds_count{action="start"} 1.0' in page
