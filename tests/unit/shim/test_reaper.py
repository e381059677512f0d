from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from services.shim.reaper import Exit, Reaper, Window
from tests.fakes.eventually import eventually


@pytest.fixture
async def reaper():
    reaper = Reaper()
    reaper.start()
    yield reaper
    reaper.stop()


def spawn(reaper, script, stdin=0, stdout=2):
    argv = ["/bin/sh", "-c", script]
    return reaper.spawn(argv, stdin=stdin, stdout=stdout, stderr=2, environment={})


@pytest.mark.parametrize(
    ("script", "code", "signum"), [("exit 0", 0, 0), ("exit 7", 7, 0), ("kill -9 $$", 137, 9)]
)
async def test_spawned_program_ends_with_code_and_figures(reaper, script, code, signum):
    pid, future = spawn(reaper, script)
    async with asyncio.timeout(10):
        ended = await future
    assert (ended.pid, ended.code, ended.signal) == (pid, code, signum)
    assert ended.exited_at_ns > 0
    assert ended.max_rss_bytes > 0


async def test_program_that_is_missing_raises(reaper):
    with pytest.raises(FileNotFoundError):
        reaper.spawn(["/no/such"], stdin=0, stdout=1, stderr=2, environment={})


async def test_orphan_that_ended_before_it_was_known_is_in_the_window(reaper):
    read, write = os.pipe()
    gate, open_gate = os.pipe()
    with reaper.window() as window:
        script = "exec 4<&0; sh -c 'read x <&4; exit 3' & echo $!"
        _, future = spawn(reaper, script, stdin=gate, stdout=write)
        os.close(write)
        await future
        orphan = int(os.read(read, 100))
        os.write(open_gate, b"\n")
        for fd in (read, gate, open_gate):
            os.close(fd)
        await eventually(lambda: not Path(f"/proc/{orphan}").exists())
        ended = asyncio.get_running_loop().create_future()
        reaper.watch(orphan, ended.set_result, window)
        async with asyncio.timeout(10):
            assert (await ended).code == 3


async def test_watched_orphan_is_told_and_others_are_counted(reaper):
    read, write = os.pipe()
    gate, open_gate = os.pipe()
    script = "exec 4<&0; sleep 100 & echo $!; sh -c 'read x <&4' &"
    _, future = spawn(reaper, script, stdin=gate, stdout=write)
    os.close(write)
    await future
    orphan = int(os.read(read, 100))
    for fd in (read, gate, open_gate):
        os.close(fd)
    ended = asyncio.get_running_loop().create_future()
    with reaper.window() as window:
        reaper.watch(orphan, ended.set_result, window)
    os.kill(orphan, signal.SIGTERM)
    async with asyncio.timeout(10):
        assert (await ended).code == 128 + signal.SIGTERM
        await eventually(lambda: reaper.zombies_reaped == 1)


def test_window_does_not_mistake_a_new_process_for_the_one_that_ended():
    window = Window()
    window.add(Exit(os.getpid(), 0, 1))
    assert window.take(os.getpid()) is None


async def test_ignored_signals_are_not_inherited(reaper):
    read, write = os.pipe()
    previous = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        _, future = spawn(reaper, "grep SigIgn /proc/self/status", stdout=write)
    finally:
        signal.signal(signal.SIGTERM, previous)
    os.close(write)
    await future
    mask = int(os.read(read, 100).split()[1], 16)
    os.close(read)
    assert mask & (1 << (signal.SIGTERM - 1)) == 0
    assert mask & (1 << (signal.SIGPIPE - 1)) == 0
