"""A shim executes another version of itself in place, under a process that does not notice."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

from protos.containerd.task.v3 import shim_pb2
from protos.containerd.types.task import task_pb2
from protos.theseus.shim.v1 import control_pb2
from services.common import errors
from tests.fakes.eventually import eventually
from tests.fakes.shim_harness import REPOSITORY, plain_spec

STREAM = "theseus-stream:"
TICKING = 'n=0; while [ ! -e "$STOP" ]; do n=$((n+1)); echo $n; sleep 0.01; done; exit 7'


async def shell(maker, fake, script, *, environment=(), **create):
    terminal = create.get("terminal", False)
    spec = plain_spec("/bin/sh", "-c", script, terminal=terminal)
    spec["process"]["env"] = list(environment)
    shim = await maker.start(maker.bundle(spec))
    await shim.create(binary=fake.path, **create)
    await shim.start()
    return shim


def another_version(directory: Path, fault: str = "") -> str:
    """A program that is a copy of this version, with ``fault`` at the start of its shim."""
    directory.mkdir()
    for name in ("services", "protos"):
        (directory / name).symlink_to(REPOSITORY / name)
    if fault:
        (directory / "services").unlink()
        shutil.copytree(REPOSITORY / "services", directory / "services")
        app = directory / "services" / "shim" / "app.py"
        text = app.read_text()
        begin = "        self._gate.shut()\n"
        assert begin in text
        app.write_text(text.replace(begin, f"{begin}        {fault}\n"))
    program = directory / "theseus-shim"
    program.write_text(
        f'#!/bin/sh\nPYTHONPATH={directory} exec {sys.executable} -m services.shim "$@"\n'
    )
    program.chmod(0o755)
    return str(program)


async def test_output_goes_on_where_it_was(maker, fake, tmp_path):
    log, stop = tmp_path / "c.log", tmp_path / "stop"
    uri = f"theseus-log://{log}"
    shim = await shell(maker, fake, TICKING, environment=[f"STOP={stop}"], stdout=uri, stderr=uri)
    follower = asyncio.create_task(follow(shim))
    for generation in range(1, 4):
        answer = await shim.reexec()
        assert (answer.generation, answer.pid) == (generation, shim.pid)
        assert answer.downtime_us > 0
    stop.touch()
    waited = await shim.patient(shim.task.Wait, shim_pb2.WaitRequest(id=shim.id))
    assert waited.exit_status == 7
    seen = [json.loads(line)["log"] for line in log.read_text().splitlines()]
    assert seen == [f"{n}\n" for n in range(1, len(seen) + 1)]
    assert (await follower).decode() == "".join(seen)
    assert "theseus_shim_generation 3.0" in await shim.metrics()


async def follow(shim):
    """All output of a process by attach, resumed wherever it breaks; a gap is a failure."""
    data = b""
    while True:
        try:
            async with shim.attach(output=True, offset=len(data)) as attached:
                async for response in attached:
                    assert not response.HasField("gap"), response
                    if response.HasField("output"):
                        assert response.output.offset == len(data)
                        data += response.output.data
                    if response.HasField("finished"):
                        return data
        except errors.Unavailable:
            continue


async def test_terminal_exec_sessions_and_waits_go_on(maker, fake, registry):
    shim = await shell(
        maker, fake, "stty -echo; cat", terminal=True, stdin="theseus-stream:", stdout=STREAM
    )
    await shim.exec(
        "e", ["/bin/sh", "-c", "read line; echo got $line; exit 5"], stdin=STREAM, stdout=STREAM
    )
    request = shim_pb2.WaitRequest(id=shim.id, exec_id="e")
    waiting = asyncio.create_task(shim.patient(shim.task.Wait, request))
    init = (await shim.state()).pid
    sent = 0
    for text in (b"one\n", b"two\n"):
        async with shim.attach(input=True, output=True, from_end=True) as attached:
            assert attached.started.terminal
            assert attached.started.input_offset == sent
            await attached.write(sent, text)
            sent += len(text)
            await attached.read_until(text.strip())
        await shim.reexec()
        assert (await shim.state()).pid == init
    assert not waiting.done()
    async with shim.attach(exec_id="e", input=True, output=True) as attached:
        await attached.write(0, b"word\n")
        await attached.read_until(b"got word")
    assert (await waiting).exit_status == 5
    await shim.call("ResizePty", shim_pb2.ResizePtyRequest(id=shim.id, width=100, height=40))
    await shim.kill()
    assert (await shim.wait()).exit_status == 128 + signal.SIGKILL
    await shim.delete()
    await registry.wait_for_topic("/tasks/delete")
    assert [event.seq for event in registry.events] == list(range(1, len(registry.events) + 1))


async def test_input_out_of_a_fifo_is_neither_lost_nor_doubled(maker, fake, tmp_path):
    fifo, out, gate = tmp_path / "in", tmp_path / "out", tmp_path / "gate"
    os.mkfifo(fifo)
    script = f"while [ ! -e {gate} ]; do sleep 0.01; done; cat"
    shim = await shell(maker, fake, script, stdin=str(fifo), stdout=f"file://{out}")
    data = b"".join(b"%07d\n" % n for n in range(60_000))  # more than pipe and FIFO hold
    writer = asyncio.create_task(asyncio.to_thread(fifo.write_bytes, data))
    for _ in range(2):
        await shim.reexec()
    gate.touch()
    await writer
    await shim.call("CloseIO", shim_pb2.CloseIORequest(id=shim.id, stdin=True))
    assert (await shim.wait()).exit_status == 0
    assert out.read_bytes() == data


async def test_end_between_two_images_is_told_once_with_its_status(maker, fake, registry, tmp_path):
    shim = await shell(
        maker,
        fake,
        "while [ ! -e $STOP ]; do sleep 0.001; done; exit 9",
        environment=[f"STOP={tmp_path}/stop"],
    )
    reexec = asyncio.create_task(shim.reexec())
    state = Path(f"/proc/{shim.pid}/cmdline")
    await eventually(lambda: b"--state" in state.read_bytes())
    (tmp_path / "stop").touch()  # while the new image comes up
    await reexec
    assert (await shim.wait()).exit_status == 9
    await registry.wait_for_topic("/tasks/exit")
    assert [event.topic for event in registry.events].count("/tasks/exit") == 1


async def test_created_container_and_added_exec_are_kept(maker, fake):
    shim = await maker.start(maker.bundle(plain_spec("/bin/sh", "-c", "sleep 1000")))
    await shim.create(binary=fake.path)
    await shim.reexec()
    assert (await shim.state()).status == task_pb2.CREATED
    await shim.start()
    await shim.kill()
    await shim.wait()
    await shim.reexec()
    state = await shim.state()
    assert (state.status, state.exit_status) == (task_pb2.STOPPED, 137)
    assert (await shim.delete()).exit_status == 137


async def test_program_that_fails_its_self_check_changes_nothing(maker, fake, tmp_path):
    shim = await shell(maker, fake, "sleep 1000")
    for program in ("/bin/false", "/bin/true", str(tmp_path / "none")):
        with pytest.raises(errors.FailedPrecondition, match=r"self-check|cannot be started"):
            await shim.reexec(program)
    assert (await shim.info()).generation == 0
    assert (await shim.state()).status == task_pb2.RUNNING


async def test_generation_must_be_the_next(maker, fake):
    shim = await shell(maker, fake, "sleep 1000")
    for generation in (0, 2):
        with pytest.raises(errors.InvalidArgument, match="is the next one"):
            await shim.patient(
                shim.control.Reexec, control_pb2.ReexecRequest(generation=generation)
            )


async def test_another_version_takes_over(maker, fake, tmp_path):
    program = another_version(tmp_path / "v2")
    shim = await shell(maker, fake, "sleep 1000")
    await shim.reexec(program)
    assert (await shim.info()).generation == 1
    await shim.kill()
    assert (await shim.wait()).exit_status == 137


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("raise RuntimeError('broken')", "RuntimeError: broken"),
        ("__import__('time').sleep(1000)", "did not serve within 8 s"),
    ],
    ids=["fails", "hangs"],
)
async def test_version_that_does_not_come_up_is_rolled_back(maker, fake, tmp_path, fault, reason):
    program = another_version(tmp_path / "bad", fault)
    log, stop = tmp_path / "c.log", tmp_path / "stop"
    uri = f"theseus-log://{log}"
    spec = plain_spec("/bin/sh", "-c", TICKING, env=[f"STOP={stop}"])
    shim = await maker.start(maker.bundle(spec), come_up_limit_s=8)
    await shim.create(binary=fake.path, stdout=uri)
    await shim.start()
    with pytest.raises(errors.FailedPrecondition, match=reason):
        await shim.reexec(program)
    assert (await shim.info()).generation == 1
    await shim.reexec()
    stop.touch()
    assert (await shim.wait()).exit_status == 7
    seen = [json.loads(line)["log"] for line in log.read_text().splitlines()]
    assert seen == [f"{n}\n" for n in range(1, len(seen) + 1)]


async def test_nothing_is_left_open_by_a_reexec(maker, fake):
    shim = await shell(maker, fake, "sleep 1000", stdout=STREAM, stdin=STREAM)
    await shim.reexec()
    await eventually(lambda: len(leaking(shim.pid)) == 0)
    before = descriptors(shim.pid)
    await shim.reexec()
    await eventually(lambda: len(descriptors(shim.pid)) <= len(before))


def descriptors(pid: int) -> list[str]:
    found = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found.append(str(entry.readlink()))
        except FileNotFoundError:
            continue
    return sorted(found)


def leaking(pid: int) -> list[str]:
    """Descriptors above the standard ones that a program executed by the shim would get."""
    found = []
    for entry in Path(f"/proc/{pid}/fdinfo").iterdir():
        flags = int(entry.read_text().split("flags:")[1].split()[0], 8)
        if int(entry.name) > 2 and not flags & os.O_CLOEXEC:
            found.append(entry.name)
    return found
