"""What is left of a task: epitaphs, the shim that answers from one, spools, codecs."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from typing import TYPE_CHECKING, Any

import pytest

from protos.containerd.events import task_pb2
from services.common import linux
from services.common.errors import DataLoss, FailedPrecondition, NotFound
from services.containerd.clients.shim_events import ShimEventCodec
from services.containerd.tasks.bundle import Bundle
from services.containerd.tasks.gone import Epitaph, GoneShim, LastWords
from services.containerd.tasks.journal import ExitNotice, ShimEvent
from services.containerd.tasks.processes import ProcessHandle, ProcessId
from services.containerd.tasks.remains import Remains, read_remains, read_spool
from services.containerd.tasks.shim import ProcessExit, Stdio, TaskStatus
from services.containerd.typed import TypedValue

if TYPE_CHECKING:
    from pathlib import Path

EPITAPH = Epitaph(
    "c1",
    "its shim (pid 5) has died",
    {
        "": LastWords(7, ProcessExit(42, 1_000, 7)),
        "e1": LastWords(8, lost="nobody saw it end"),
    },
)


def test_an_epitaph_is_read_as_it_was_written() -> None:
    written = json.loads(json.dumps(EPITAPH.to_json()))
    assert Epitaph.from_json("c1", written) == EPITAPH


async def test_what_is_known_is_answered() -> None:
    shim = GoneShim(EPITAPH)
    assert (await shim.wait("")).exit_status == 42
    state = await shim.state("")
    assert (state.id, state.status, state.exit_status) == ("c1", TaskStatus.STOPPED, 42)
    assert await shim.pids() == []
    assert await shim.metrics() == b""
    with pytest.raises(NotFound, match="already finished"):
        await shim.kill("", 9)


async def test_what_is_lost_is_lost_in_words() -> None:
    shim = GoneShim(EPITAPH)
    for question in (shim.wait, shim.delete):
        with pytest.raises(DataLoss, match=r"process 'e1' of task 'c1'.*nobody saw it end"):
            await question("e1")
    state = await shim.state("e1")
    assert (state.status, state.exit_status, state.exited_at_ns) == (TaskStatus.UNKNOWN, 0, 0)


async def test_what_needs_a_shim_is_refused_and_what_is_unknown_not_found() -> None:
    shim = GoneShim(EPITAPH)
    value = TypedValue("", b"")
    for refused in (
        shim.start(""),
        shim.exec("e2", Stdio(), value),
        shim.pause(),
        shim.resume(),
        shim.resize("", 1, 1),
        shim.update(None, {}),
        shim.checkpoint("/x", None),
        shim.connect(),
    ):
        with pytest.raises(FailedPrecondition, match="has died; delete it"):
            await refused
    for unknown in (shim.wait("e9"), shim.state("e9"), shim.close_io("e9"), shim.kill("e9", 1)):
        with pytest.raises(NotFound):
            await unknown


def test_a_spool_is_read_in_order_and_without_drafts(tmp_path: Path) -> None:
    bundle = Bundle("ns", "c1", tmp_path)
    codec = ShimEventCodec()
    assert read_spool(bundle, codec.decode_spooled) == []
    spool = tmp_path / "spool"
    spool.mkdir()
    for seq in (10, 9):
        event = {
            "seq": seq,
            "timestamp_ns": seq,
            "topic": "/tasks/exit",
            "fields": {
                "container_id": "c1",
                "id": "c1",
                "pid": 5,
                "exit_status": seq,
                "exited_at_ns": 7_000_000_001,
                "oom_killed": True,
            },
        }
        (spool / str(seq)).write_text(json.dumps(event))
    (spool / "11.tmp").write_text("{")
    (spool / "12").write_text("{")
    (spool / "13").write_text(json.dumps({"seq": 4, "timestamp_ns": 1, "topic": "/", "fields": {}}))
    events = read_spool(bundle, codec.decode_spooled)
    assert [event.seq for event in events] == [9, 10]
    message = task_pb2.TaskExit.FromString(events[0].event.value)
    assert message.exited_at.ToNanoseconds() == 7_000_000_001
    notice = codec.decode_exit(events[0].event)
    assert notice == ExitNotice("c1", "", ProcessExit(9, 7_000_000_001, 5))


def test_a_spooled_creation_keeps_its_nested_parts() -> None:
    fields = {
        "container_id": "c1",
        "rootfs": [{"type": "overlay", "source": "o", "options": ["a", "b"]}],
        "stdout": "/x",
        "terminal": True,
        "pid": 3,
    }
    spooled = {"seq": 1, "timestamp_ns": 1, "topic": "/tasks/create", "fields": fields}
    event = ShimEventCodec().decode_spooled(json.dumps(spooled).encode())
    assert event is not None
    message = task_pb2.TaskCreate.FromString(event.event.value)
    assert list(message.rootfs[0].options) == ["a", "b"]
    assert (message.io.stdout, message.io.terminal, message.pid) == ("/x", True, 3)


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b'{"topic": "/no/such"}', b"\xff"])
def test_a_spooled_event_without_sense_is_none(data: bytes) -> None:
    assert ShimEventCodec().decode_spooled(data) is None


@pytest.mark.parametrize("exec_id", ["", "e1"])
@pytest.mark.parametrize("end", [ProcessExit(3, 5_000, 9), None])
def test_exits_come_back_out_of_their_messages(exec_id: str, end: ProcessExit | None) -> None:
    codec = ShimEventCodec()
    notice = ExitNotice("c1", exec_id, end)
    assert codec.decode_exit(codec.encode_exit(notice)) == notice


def test_messages_without_sense_are_none() -> None:
    codec = ShimEventCodec()
    assert codec.decode_exit(TypedValue("containerd.events.TaskExit", b"\xff")) is None
    assert codec.decode_exec_added(TypedValue("x", b"\xff")) == ""


def test_notes_of_a_shim_that_are_broken_are_none(tmp_path: Path) -> None:
    bundle = Bundle("ns", "c1", tmp_path)
    assert read_remains(bundle) is None
    for broken in ("{", '{"containers": [3]}', '{"containers": [{"id": "c1", "processes": [{}]}]}'):
        (tmp_path / "state.json").write_text(broken)
        assert read_remains(bundle) is None
    (tmp_path / "state.json").write_text('{"epoch": 1, "containers": []}')
    assert read_remains(bundle) == Remains({})


async def test_a_process_is_told_from_another_with_its_pid() -> None:
    child = await asyncio.create_subprocess_exec("sleep", "infinity")
    start_time: Any = linux.process_start_time(child.pid)
    assert ProcessHandle.open(ProcessId(child.pid, start_time + 1)) is None
    handle = ProcessHandle.open(ProcessId(child.pid, start_time))
    assert handle is not None
    with handle:
        assert handle.exit_status() is None
        assert await handle.kill(timeout_s=5)
        await child.wait()
        assert handle.exit_status() == 128 + signal.SIGKILL
        handle.send_signal(signal.SIGTERM)  # of no consequence
    assert ProcessHandle.open(ProcessId(child.pid, start_time)) is None
    assert ProcessHandle.open(ProcessId(-1, 0)) is None
    assert os.waitstatus_to_exitcode(9) == -9


def test_an_event_that_is_acknowledged_while_the_spool_is_read_is_passed_over(
    tmp_path: Path,
) -> None:
    bundle = Bundle("test", "c", tmp_path)
    spool = tmp_path / "spool"
    spool.mkdir()
    for seq in (1, 2):
        (spool / str(seq)).write_text(str(seq))

    def decode(data: bytes) -> ShimEvent:
        for path in spool.iterdir():
            path.unlink()
        return ShimEvent(int(data), 0, "/tasks/oom", TypedValue("x", b""))

    assert len(read_spool(bundle, decode)) == 1
