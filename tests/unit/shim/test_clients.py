from __future__ import annotations

import asyncio

import pytest

from protos.containerd.events import task_pb2
from protos.theseus.shim.v1 import registry_pb2
from services.shim import events
from services.shim.clients.appearance import Appearance
from services.shim.clients.events import pack
from services.shim.clients.registry import RegistryClient
from services.shim.events import Event
from services.shim.metrics import ShimMetrics
from services.shim.spool import Spool


def test_exit_becomes_upstreams_message_without_what_it_has_no_field_for():
    packed = pack(
        Event(
            events.TASK_EXIT,
            {
                "container_id": "c",
                "id": "e",
                "pid": 5,
                "exit_status": 137,
                "exited_at_ns": 1_500_000_000,
                "signal": 9,
                "usage": {"user_us": 1},
            },
        )
    )
    assert packed.type_url == "containerd.events.TaskExit"
    message = task_pb2.TaskExit.FromString(packed.value)
    assert (message.container_id, message.id, message.pid, message.exit_status) == (
        "c",
        "e",
        5,
        137,
    )
    assert (message.exited_at.seconds, message.exited_at.nanos) == (1, 500_000_000)


def test_create_carries_mounts_and_streams():
    packed = pack(
        Event(
            events.TASK_CREATE,
            {
                "container_id": "c",
                "bundle": "/b",
                "rootfs": [{"type": "bind", "source": "/s", "target": "", "options": ["ro"]}],
                "stdin": "",
                "stdout": "/o",
                "stderr": "",
                "terminal": True,
                "pid": 4,
            },
        )
    )
    message = task_pb2.TaskCreate.FromString(packed.value)
    assert message.rootfs[0].options == ["ro"]
    assert (message.io.stdout, message.io.terminal, message.pid) == ("/o", True, 4)


@pytest.mark.parametrize(
    ("topic", "fields", "kind"),
    [
        (events.TASK_START, {"container_id": "c", "pid": 1}, "TaskStart"),
        (events.TASK_OOM, {"container_id": "c"}, "TaskOOM"),
        (events.TASK_PAUSED, {"container_id": "c"}, "TaskPaused"),
        (events.TASK_RESUMED, {"container_id": "c"}, "TaskResumed"),
        (events.TASK_EXEC_ADDED, {"container_id": "c", "exec_id": "e"}, "TaskExecAdded"),
        (events.TASK_EXEC_STARTED, {"container_id": "c", "exec_id": "e"}, "TaskExecStarted"),
        (events.TASK_DELETE, {"container_id": "c", "exited_at_ns": 0}, "TaskDelete"),
    ],
)
def test_topic_says_which_message(topic, fields, kind):
    packed = pack(Event(topic, fields))
    assert packed.type_url == f"containerd.events.{kind}"
    assert getattr(task_pb2, kind).FromString(packed.value).container_id == "c"


async def appears(appearance):
    """Wait far longer than it may take; fails when only the time limit ended it."""
    started = asyncio.get_running_loop().time()
    await appearance.wait(10)
    assert asyncio.get_running_loop().time() - started < 5


async def test_file_is_noticed_when_it_appears(tmp_path):
    with Appearance(tmp_path / "sock") as appearance:
        (tmp_path / "other").touch()
        await appearance.wait(0.02)
        (tmp_path / "sock").touch()
        await appears(appearance)
        (tmp_path / "new").touch()
        (tmp_path / "new").rename(tmp_path / "sock")
        await appears(appearance)


async def test_directory_that_vanishes_and_comes_back_is_watched_again(tmp_path):
    directory = tmp_path / "run" / "containerd"
    with Appearance(directory / "sock") as appearance:
        directory.parent.mkdir()
        await appears(appearance)
        directory.mkdir()
        await appears(appearance)
        (directory / "sock").touch()
        await appears(appearance)
        (directory / "sock").unlink()
        directory.rmdir()
        directory.parent.rmdir()
        await appearance.wait(0.02)
        directory.mkdir(parents=True)
        await appears(appearance)
        (directory / "sock").touch()
        await appears(appearance)


async def test_waiting_says_whether_something_appeared(tmp_path):
    appearance = Appearance(tmp_path / "sock")
    assert not appearance.watching
    with appearance:
        assert appearance.watching
        assert not await appearance.wait(0.01)
        (tmp_path / "sock").touch()
        assert await appearance.wait(10)
        assert not await appearance.wait(0.01)


def test_shims_come_back_in_turns_the_longer_the_more_there_are(tmp_path):
    crowd = tmp_path / "s"
    client = RegistryClient(
        tmp_path / "containerd.sock",
        hello=registry_pb2.Hello,
        spool=Spool(tmp_path / "spool"),
        metrics=ShimMetrics(),
        epoch=0,
        epoch_seen=lambda _: None,
        crowd=crowd,
    )
    assert client._turn_s() == 0  # it is not there: nobody else is either
    crowd.mkdir()
    for number in range(200):
        (crowd / str(number)).touch()
    turns = [client._turn_s() for _ in range(1000)]
    assert 0 <= min(turns) < 0.02
    assert 0.18 < max(turns) <= 0.2


def test_metrics_page_has_the_shims_figures():
    metrics = ShimMetrics()
    metrics.read("stdout", 4)
    metrics.newlines("stdout", 2)
    metrics.dropped("stderr", 7)
    page = metrics.page().decode()
    assert 'theseus_shim_output_bytes_total{stream="stdout"} 4.0' in page
    assert 'theseus_shim_output_lines_total{stream="stdout"} 2.0' in page
    assert 'theseus_shim_dropped_bytes_total{stream="stderr"} 7.0' in page
    assert "theseus_shim_generation 0.0" in page
