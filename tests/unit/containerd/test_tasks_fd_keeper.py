"""containerd sees to it that there is a keeper of descriptors."""

from __future__ import annotations

import asyncio
import json
import os
import select
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from services.containerd.tasks.fd_keeper import DescriptorKeeper
from tests.fakes.eventually import eventually

PROGRAM = (sys.executable, "-m", "services.shim")


def keeper_pid(path: Path) -> int:
    """Process id of the keeper that serves there now; 0 for none."""
    with (
        suppress(OSError),
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection,
    ):
        connection.connect(str(path))
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        return int.from_bytes(credentials[:4], sys.byteorder)
    return 0


async def test_keeper_is_started_again_when_it_dies(tmp_path: Path) -> None:
    path = tmp_path / "keeper.sock"
    async with DescriptorKeeper(PROGRAM, path):
        await eventually(lambda: keeper_pid(path))
        first = keeper_pid(path)
        os.kill(first, signal.SIGKILL)
        await eventually(lambda: keeper_pid(path) not in (0, first))
    await eventually(lambda: not path.exists())  # nobody needs it any more


async def test_keeper_that_is_there_is_used(tmp_path: Path) -> None:
    path = tmp_path / "keeper.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as shim:
        async with DescriptorKeeper(PROGRAM, path):
            await eventually(lambda: keeper_pid(path))
            first = keeper_pid(path)
            shim.connect(str(path))
        async with DescriptorKeeper(PROGRAM, path):
            await asyncio.sleep(0)
            assert keeper_pid(path) == first


async def test_keeper_that_is_there_is_held_without_another_start(tmp_path: Path) -> None:
    path, loop = tmp_path / "keeper.sock", asyncio.get_running_loop()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as found:
        found.bind(str(path))
        found.listen()
        found.setblocking(False)
        keeper = DescriptorKeeper(("/nowhere/theseus-shim",), path)
        await keeper.__aenter__()
        connection, _ = await loop.sock_accept(found)
        with connection:
            with pytest.raises(BlockingIOError):  # held, and nothing is said
                connection.recv(1)
            await keeper.__aexit__(None, None, None)
            assert await loop.sock_recv(connection, 1) == b""


async def test_what_is_released_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "keeper.sock"
    read, write = os.pipe()
    async with DescriptorKeeper(PROGRAM, path) as keeper:
        await eventually(lambda: keeper_pid(path))
        message = json.dumps({"op": "store", "owner": "i1", "names": ["a"]}).encode()
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as shim:
            shim.connect(str(path))
            socket.send_fds(shim, [message], [write])
        os.close(write)
        held = select.poll()
        held.register(read)
        await eventually(lambda: keeper_holds_a_pipe(path))
        assert held.poll(0) == []  # not ended: the keeper has the other end
        keeper.release("i1")
        await eventually(lambda: held.poll(0))
    os.close(read)


def keeper_holds_a_pipe(path: Path) -> bool:
    for entry in Path(f"/proc/{keeper_pid(path)}/fd").iterdir():
        with suppress(FileNotFoundError):  # the end of an earlier look's connection
            if str(entry.readlink()).startswith("pipe:"):
                return True
    return False


async def test_program_that_cannot_be_run_is_tried_again(tmp_path: Path) -> None:
    program = tmp_path / "theseus-shim"
    path = tmp_path / "keeper.sock"
    async with DescriptorKeeper((str(program),), path):
        await asyncio.sleep(0)
        program.write_text(f'#!/bin/sh\nexec {sys.executable} -m services.shim "$@"\n')
        program.chmod(0o755)
        await eventually(lambda: keeper_pid(path))
    await eventually(lambda: not path.exists())


async def test_keeper_that_came_up_while_its_containerd_ended_goes_at_once(tmp_path: Path) -> None:
    """It waits ten seconds for who started it; there is nobody any more."""
    program, path, is_there = tmp_path / "slow", tmp_path / "keeper.sock", tmp_path / "is there"
    command = f'{sys.executable} -m services.shim "$@"'
    program.write_text(f"#!/bin/sh\n{command}\n: > '{is_there}'\nexec sleep 1000\n")
    program.chmod(0o755)
    async with DescriptorKeeper((str(program),), path):
        await eventually(is_there.exists)
        assert path.exists()
    async with asyncio.timeout(5):
        await eventually(lambda: not path.exists())


async def test_keeper_whose_socket_is_gone_does_not_wait_for_who_started_it(tmp_path: Path) -> None:
    """That was killed meanwhile, and somebody has cleaned up after it."""
    path = tmp_path / "keeper.sock"
    command = (*PROGRAM, "keeper", "--socket", str(path))
    started = await asyncio.create_subprocess_exec(*command)
    assert await started.wait() == 0
    (keeper,) = running(str(path))
    path.unlink()
    async with asyncio.timeout(5):
        await eventually(lambda: not Path(f"/proc/{keeper}").exists())


def running(argument: str) -> list[str]:
    """Pids of the processes that have an argument."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            if argument.encode() in (entry / "cmdline").read_bytes().split(b"\0"):
                found.append(entry.name)
    return found
