"""Events on their way from the spool to containerd's ttrpc event service."""

import asyncio
import shutil

import pytest

from services.common.errors import InvalidArgument, Unavailable
from services.shim import events
from services.shim.events import Event
from services.shim.spool import Spool
from services.shim.ttrpc.events import EventForwarder
from tests.fakes.stock_shim import Events


def exit_event(number):
    fields = {"container_id": "c", "id": "c", "pid": number, "exit_status": 3}
    return Event(events.TASK_EXIT, {**fields, "exited_at_ns": 5_000_000_007, "signal": 0})


@pytest.fixture
async def containerd(tmp_path):
    service = Events(tmp_path / "t.sock")
    yield service
    await service.stop()


@pytest.fixture
async def spool(tmp_path):
    return Spool(tmp_path / "spool", keep=True)


@pytest.fixture
async def forwarding(containerd, spool):
    task = asyncio.create_task(EventForwarder(containerd.path, namespace="ns", spool=spool).run())
    yield task
    assert not task.done()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_an_event_comes_with_its_namespace_and_times(containerd, spool, forwarding):
    await containerd.start()
    spool.emit(exit_event(7))
    async with asyncio.timeout(5):
        envelope = await containerd.envelopes.get()
    assert (envelope.namespace, envelope.topic) == ("ns", "/tasks/exit")
    assert envelope.event.type_url == "containerd.events.TaskExit"
    assert envelope.timestamp.seconds > 1_700_000_000
    containerd.envelopes.put_nowait(envelope)
    _, told = await containerd.next()
    assert (told.pid, told.exit_status, told.exited_at.ToNanoseconds()) == (7, 3, 5_000_000_007)
    async with asyncio.timeout(5):
        await spool.emptied()


async def test_order_survives_refusals_and_restarts(containerd, spool, forwarding):
    for number in range(1, 4):
        spool.emit(exit_event(number))
    containerd.refusals = [Unavailable("not now"), Unavailable("not now")]
    await containerd.start()
    assert [(await containerd.next())[1].pid for _ in range(3)] == [1, 2, 3]
    await containerd.stop()
    spool.emit(exit_event(4))
    await containerd.start()
    assert (await containerd.next())[1].pid == 4


async def test_an_event_that_no_containerd_would_take_does_not_block_the_others(
    containerd, spool, forwarding
):
    containerd.refusals = [InvalidArgument("no such topic")]
    await containerd.start()
    spool.emit(exit_event(1))
    spool.emit(exit_event(2))
    assert (await containerd.next())[1].pid == 2
    async with asyncio.timeout(5):
        await spool.emptied()


async def test_events_outlive_the_bundle(containerd, spool, forwarding, tmp_path):
    spool.emit(exit_event(1))
    shutil.rmtree(tmp_path / "spool")
    spool.emit(exit_event(2))
    await containerd.start()
    assert [(await containerd.next())[1].pid for _ in range(2)] == [1, 2]


async def test_a_spool_that_left_its_directory_removes_nothing_there(spool, tmp_path):
    for number in range(1, 4):
        spool.emit(exit_event(number))
    spool.leave_directory()
    spool.acknowledge(3)
    assert sorted(path.name for path in (tmp_path / "spool").iterdir()) == ["1", "2", "3"]
    assert len(spool) == 0
