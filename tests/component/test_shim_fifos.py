"""FIFOs as containerd's clients make them, with clients that are late, slow or gone; loggers."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from protos.containerd.task.v3 import shim_pb2
from protos.containerd.types.task import task_pb2
from services.common import errors
from tests.fakes.eventually import eventually
from tests.fakes.runtime import install
from tests.fakes.shim_harness import plain_spec

# More than a FIFO and what the shim holds for it take.
MANY = 500_000
NUMBERS = b"".join(b"%d\n" % number for number in range(1, MANY + 1))
COUNT = f"seq 1 {MANY}"


@pytest.fixture
async def shell(maker, tmp_path):
    fake = install(tmp_path / "fake")

    async def start(script, **create):
        terminal = create.get("terminal", False)
        bundle = maker.bundle(plain_spec("/bin/sh", "-c", script, terminal=terminal))
        shim = await maker.start(bundle)
        await shim.create(binary=fake.path, **create)
        await shim.start()
        return shim

    return start


def fifo(directory: Path, name: str) -> Path:
    path = directory / name
    os.mkfifo(path)
    return path


async def read(path: Path, limit: int = len(NUMBERS) + 1, piece: int = 65536) -> bytes:
    """What a client reads that comes now, and goes after ``limit`` bytes or at the end."""
    loop = asyncio.get_running_loop()
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    found, readable = bytearray(), asyncio.Event()
    loop.add_reader(fd, readable.set)
    try:
        while len(found) < limit:
            # Before the first writer has come there is nothing to read, nor an end (poll(2)).
            await readable.wait()
            readable.clear()
            try:
                data = os.read(fd, min(piece, limit - len(found)))
            except BlockingIOError:
                continue
            if not data:
                break
            found += data
        return bytes(found)
    finally:
        loop.remove_reader(fd)
        os.close(fd)


def write(path: Path, text: bytes) -> None:
    """What a client writes that comes and goes; the shim has to be there."""
    fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    os.write(fd, text)
    os.close(fd)


def waits_to_write(pid: int) -> bool:
    """Whether a process, or the child that it waits for, sleeps in write(2) on its pipe."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return any(
        Path(f"/proc/{each}/wchan").read_text().endswith("pipe_write") for each in (pid, *children)
    )


async def test_client_that_comes_late_gets_everything(shell, tmp_path):
    out = fifo(tmp_path, "out")
    shim = await shell(COUNT, stdout=str(out))
    waiting = asyncio.create_task(shim.wait())
    pid = (await shim.state()).pid
    await eventually(lambda: waits_to_write(pid))
    assert (await shim.state()).status == task_pb2.RUNNING
    assert await read(out) == NUMBERS
    assert (await waiting).exit_status == 0


async def test_client_that_goes_is_followed_by_another(shell, tmp_path):
    out = fifo(tmp_path, "out")
    shim = await shell(COUNT, stdout=str(out))
    first = await read(out, 50_000)
    second = await read(out, 1)
    third = await read(out)
    assert first + second + third == NUMBERS
    assert (await shim.wait()).exit_status == 0


async def test_slow_client_gets_everything_and_does_not_hold_up_the_exit(shell, tmp_path):
    out, err = fifo(tmp_path, "out"), fifo(tmp_path, "err")
    # Before the process ends, with which its FIFOs do.
    reading = asyncio.create_task(read(err))
    shim = await shell(f"{COUNT} & echo bad >&2; wait", stdout=str(out), stderr=str(err))
    slow = asyncio.create_task(read(out, piece=997))
    assert await reading == b"bad\n"
    assert (await shim.wait()).exit_status == 0
    assert await slow == NUMBERS
    await shim.delete()


async def test_output_that_nobody_ever_reads_holds_up_neither_exit_nor_delete(shell, tmp_path):
    out = fifo(tmp_path, "out")
    shim = await shell("echo hello", stdout=str(out), stderr=str(out))
    assert (await shim.wait()).exit_status == 0
    await shim.delete()


async def test_input_comes_from_one_client_after_the_other_until_it_is_closed(shell, tmp_path):
    inp, out = fifo(tmp_path, "in"), fifo(tmp_path, "out")
    shim = await shell("cat; echo end", stdin=str(inp), stdout=str(out))
    reading = asyncio.create_task(read(out))
    for text in (b"one\n", b"two\n"):
        write(inp, text)
    await shim.call("CloseIO", shim_pb2.CloseIORequest(id=shim.id, stdin=True))
    assert await reading == b"one\ntwo\nend\n"
    assert (await shim.wait()).exit_status == 0


async def test_terminal_and_exec_use_fifos_too(shell, tmp_path):
    out, exec_out, exec_in = (fifo(tmp_path, name) for name in ("out", "exec-out", "exec-in"))
    shim = await shell("test -t 1 && echo tty; exec sleep 1000", stdout=str(out), terminal=True)
    assert await read(out, 5) == b"tty\r\n"
    await shim.exec("e", ["/bin/cat"], stdin=str(exec_in), stdout=str(exec_out))
    reading = asyncio.create_task(read(exec_out))
    write(exec_in, b"through\n")
    await shim.call("CloseIO", shim_pb2.CloseIORequest(id=shim.id, exec_id="e", stdin=True))
    assert await reading == b"through\n"
    assert (await shim.wait("e")).exit_status == 0


def logger(directory: Path, script: str) -> Path:
    path = directory / "logger"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


async def test_logger_says_by_a_byte_that_it_is_ready(shell, tmp_path):
    out = tmp_path / "out"
    path = logger(tmp_path, f"printf x >&5; cat <&3 > {out}.part; mv {out}.part {out}")
    shim = await shell("echo logged", stdout=f"binary://{path}")
    await shim.wait()
    await shim.delete()
    await eventually(out.exists)
    assert out.read_text() == "logged\n"


async def test_logger_that_fails_before_it_is_ready_is_told(shell, tmp_path):
    path = logger(tmp_path, "exit 3")
    with pytest.raises(errors.FailedPrecondition, match="ended with 3 before it was ready"):
        await shell("echo never", stdout=f"binary://{path}")


async def test_logger_that_dies_takes_nobody_along(shell, tmp_path):
    path = logger(tmp_path, "exec 5>&-; read line <&3; exit 1")
    shim = await shell(
        'trap "" PIPE; echo one; while echo more 2>/dev/null; do :; done; exit 7',
        stdout=f"binary://{path}",
    )
    assert (await shim.wait()).exit_status == 7
    await shim.delete()


async def test_terminal_output_goes_to_a_logger(shell, tmp_path):
    out = tmp_path / "out"
    path = logger(tmp_path, f"exec 5>&-; cat <&3 > {out}.part; mv {out}.part {out}")
    shim = await shell("test -t 1 && echo tty", stdout=f"binary://{path}", terminal=True)
    await shim.wait()
    await shim.delete()
    await eventually(out.exists)
    assert out.read_bytes() == b"tty\r\n"
