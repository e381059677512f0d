"""A shim that serves several bundles: how they come and go, and what each keeps for itself."""

from __future__ import annotations

import asyncio
import json

import grpc
import pytest

from protos.containerd.task.v3 import shim_pb2
from protos.containerd.types.task import task_pb2
from protos.theseus.shim.v1 import control_pb2
from services.common import errors
from services.common.rpc_errors import translated
from tests.fakes.eventually import eventually
from tests.fakes.registry_server import FakeRegistry
from tests.fakes.shim_harness import RunningShim, plain_spec

SLEEP = ("sleep", "1000")


async def host(shim, maker, bundle, **more):
    """Have a shim serve a bundle too; returns that one as a shim of its own."""
    request = maker.request(bundle, socket=shim.request["socket"])
    message = control_pb2.HostRequest(
        namespace=more.get("namespace", request["namespace"]),
        id=request["id"],
        bundle=request["bundle"],
        instance_id=more.get("instance_id", request["instance_id"]),
        adopt=more.get("adopt", False),
    )
    with translated():
        answer = await shim.control.Host(message, timeout=20)
        again = await shim.control.Host(message, timeout=20)
    assert answer == again
    assert answer.pid == shim.pid
    member = RunningShim({"pid": answer.pid}, request)
    maker._stack.push_async_callback(member.close)
    return member


async def leave(shim, member, *, now=False):
    with translated():
        await shim.control.Leave(control_pb2.LeaveRequest(id=member.id, now=now), timeout=20)


async def members(shim):
    return list((await shim.info()).members)


async def test_each_member_has_its_own_events_state_and_registration(maker, fake):
    registry = FakeRegistry(maker.registry_socket)
    await registry.start()
    first = await maker.start(maker.bundle(plain_spec(*SLEEP)))
    second = await host(first, maker, maker.bundle(plain_spec("sh", "-c", "exit 3")))
    for shim in (first, second):
        await shim.create(binary=fake.path)
        await shim.start()
    assert (await second.wait()).exit_status == 3
    await eventually(lambda: {h.id for h in registry.hellos} == {first.id, second.id})
    assert len({hello.instance_id for hello in registry.hellos}) == 2
    assert {hello.pid for hello in registry.hellos} == {first.pid}
    for shim in (first, second):
        state = json.loads((shim.bundle / "state.json").read_text())
        assert [container["id"] for container in state["containers"]] == [shim.id]
        assert json.loads((shim.bundle / "shim.json").read_text())["pid"] == first.pid
    await second.delete()
    await leave(first, second)
    assert await members(first) == [first.id]
    assert (await first.state()).status == task_pb2.RUNNING
    await first.kill()
    await first.wait()
    await first.delete()
    await leave(first, first)
    await first.ended()
    await registry.stop()


async def test_a_member_leaves_once_its_events_are_acknowledged(maker, fake):
    first = await maker.start(maker.bundle(plain_spec(*SLEEP)))
    second = await host(first, maker, maker.bundle(plain_spec(*SLEEP)))
    await second.create(binary=fake.path)
    with pytest.raises(errors.FailedPrecondition, match="not deleted"):
        await leave(first, second)
    await second.delete()
    leaving = asyncio.create_task(leave(first, second))
    assert "theseus_shim_spool_length 3" in await first.metrics()
    assert await members(first) == [first.id, second.id]
    registry = FakeRegistry(maker.registry_socket)
    await registry.start()
    await leaving
    await leave(first, second)  # it is gone, which is no error
    assert await members(first) == [first.id]
    assert "/tasks/delete" in registry.topics()
    await registry.stop()


async def test_a_member_does_not_leave_before_the_runtime_has_deleted_its_container(
    maker, fake, registry
):
    fake.hold("delete")
    first = await maker.start(maker.bundle(plain_spec(*SLEEP)))
    second = await host(first, maker, maker.bundle(plain_spec(*SLEEP)))
    await second.create(binary=fake.path)
    await second.delete()
    leaving = asyncio.create_task(leave(first, second))
    await registry.wait_for_topic("/tasks/delete")
    assert await members(first) == [first.id, second.id]
    assert not leaving.done()
    fake.release("delete")
    await leaving
    assert json.loads((second.bundle / "state.json").read_text())["containers"] == []


async def test_a_member_that_leaves_now_takes_its_container_with_it(maker, fake):
    first = await maker.start(maker.bundle(plain_spec(*SLEEP)))
    second = await host(first, maker, maker.bundle(plain_spec(*SLEEP)))
    await second.create(binary=fake.path)
    await second.start()
    await leave(first, second, now=True)
    assert await members(first) == [first.id]
    with pytest.raises(errors.NotFound):
        await second.state()
    assert fake.calls()[-1][0] == "delete"


async def test_what_cannot_be_hosted_is_refused_and_leaves_nothing(maker, fake):
    first = await maker.start(maker.bundle(plain_spec(*SLEEP)))
    other = maker.bundle(plain_spec(*SLEEP))
    with pytest.raises(errors.InvalidArgument, match="namespace"):
        await host(first, maker, other, namespace="another")
    with pytest.raises(errors.FailedPrecondition, match="no container to take over"):
        await host(first, maker, other, adopt=True)
    with pytest.raises(errors.InvalidArgument, match="absolute"), translated():
        request = control_pb2.HostRequest(
            namespace="test", id="x", bundle="not/absolute", instance_id="0" * 32
        )
        await first.control.Host(request, timeout=20)
    assert await members(first) == [first.id]
    await host(first, maker, other)
    with pytest.raises(errors.AlreadyExists):
        await host(first, maker, other, instance_id="f" * 32)
    assert await members(first) == [first.id, other.name]
    await first.call("Shutdown", shim_pb2.ShutdownRequest(id=first.id, now=True))
    await first.ended()


async def test_members_are_the_same_after_a_reexecution(maker, fake):
    registry = FakeRegistry(maker.registry_socket)
    await registry.start()
    first = await maker.start(maker.bundle(plain_spec(*SLEEP)))
    second = await host(first, maker, maker.bundle(plain_spec(*SLEEP)))
    waiting = await host(first, maker, maker.bundle(plain_spec(*SLEEP)))
    for shim in (first, second):
        await shim.create(binary=fake.path)
        await shim.start()
    assert (await first.reexec()).generation == 1
    assert await members(first) == [first.id, second.id, waiting.id]
    for shim in (first, second):
        assert (await shim.state()).status == task_pb2.RUNNING
        assert json.loads((shim.bundle / "state.json").read_text())["containers"]
    await waiting.create(binary=fake.path)
    await leave(first, waiting, now=True)
    await second.kill()
    assert (await second.wait()).exit_status == 137
    await second.delete()
    await leave(first, second)
    with pytest.raises(grpc.aio.AioRpcError):
        await second.task.State(shim_pb2.StateRequest(id=second.id), timeout=20)
    await registry.stop()
