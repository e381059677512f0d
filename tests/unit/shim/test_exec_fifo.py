"""What waits at exec.fifo as runc's or crun's init does is let go; anything else is left alone."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from services.shim.runtimes import exec_fifo


def open_descriptors():
    return sorted(fd.name for fd in Path("/proc/self/fd").iterdir())


@pytest.fixture
def state(tmp_path):
    """A container's state directory; nothing is left open behind it."""
    before = open_descriptors()
    yield tmp_path
    assert open_descriptors() == before


def made_by(runtime, state):
    (state / {"runc": "state.json", "crun": "status"}[runtime]).touch()
    os.mkfifo(state / "exec.fifo", 0o600)


def runc_init(fifo):
    """Returns once somebody has opened the other end."""
    fd = os.open(fifo, os.O_WRONLY)
    os.write(fd, b"0")
    os.close(fd)


async def test_init_of_runc_goes_on_and_says_so(state):
    made_by("runc", state)
    init = asyncio.create_task(asyncio.to_thread(runc_init, state / "exec.fifo"))
    assert await exec_fifo.let_go(state)
    await asyncio.wait_for(init, 5)
    assert not (state / "exec.fifo").exists()


async def test_init_of_runc_may_come_after_it_was_let_go(state):
    made_by("runc", state)
    letting_go = asyncio.create_task(exec_fifo.let_go(state))
    await asyncio.sleep(0)
    assert (state / "exec.fifo").exists()
    await asyncio.wait_for(asyncio.to_thread(runc_init, state / "exec.fifo"), 5)
    assert await letting_go


async def test_init_of_crun_gets_its_byte(state):
    made_by("crun", state)
    init = os.open(state / "exec.fifo", os.O_RDONLY | os.O_NONBLOCK)  # as crun opens it
    try:
        assert await exec_fifo.let_go(state)
        assert os.read(init, 2) == b"\0"
    finally:
        os.close(init)
    assert not (state / "exec.fifo").exists()


@pytest.mark.parametrize("runtime", ["runc", "crun"])
async def test_where_nobody_waits_the_fifo_stays(state, runtime, monkeypatch):
    monkeypatch.setattr(exec_fifo, "_WORD_S", 0.05)
    made_by(runtime, state)
    assert not await exec_fifo.let_go(state)
    assert (state / "exec.fifo").exists()


async def test_init_of_runc_that_dies_over_it_has_not_gone_on(state):
    made_by("runc", state)
    letting_go = asyncio.create_task(exec_fifo.let_go(state))
    await asyncio.sleep(0)
    os.close(os.open(state / "exec.fifo", os.O_WRONLY))
    assert not await asyncio.wait_for(letting_go, 0.5)


@pytest.mark.parametrize("runtime", ["runc", "crun"])
async def test_a_container_that_was_started_is_not_started_again(state, runtime):
    made_by(runtime, state)
    (state / "exec.fifo").unlink()
    assert not await exec_fifo.let_go(state)


async def test_what_neither_runtime_made_is_nothing_known(state):
    os.mkfifo(state / "exec.fifo")
    assert not await exec_fifo.let_go(state)
    assert not await exec_fifo.let_go(state / "missing")
    assert (state / "exec.fifo").exists()
