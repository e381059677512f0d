"""Small parts of the container package: input that can be sent again, sessions, locks, runtimes."""

from __future__ import annotations

import asyncio

import pytest

from services.common.errors import DataLoss, FailedPrecondition, InvalidArgument
from services.daemon.config import parse
from services.daemon.containers.input_feed import InputFeed
from services.daemon.containers.locks import OperationLocks
from services.daemon.containers.oci_runtimes import OciRuntimes, cgroup_layout
from services.daemon.containers.outliving import OutlivingWork
from services.daemon.containers.runtime import CloseInput, Input, Resize
from services.daemon.containers.sessions import Sessions


def at(position):
    future = asyncio.get_running_loop().create_future()
    future.set_result(position)
    return future


async def source(*pieces):
    for piece in pieces:
        yield piece


async def collect(feed, position, count):
    given = []
    generator = feed.give_out(at(position))
    async for piece in generator:
        given.append(piece)
        if len(given) == count:
            break
    await generator.aclose()
    return given


async def test_input_is_given_from_any_byte_that_is_kept():
    feed = InputFeed(source(Input(0, b"hello "), Input(6, b"world"), CloseInput()))
    await feed.take_in()
    assert await collect(feed, 0, 2) == [Input(0, b"hello world"), CloseInput()]
    assert await collect(feed, 6, 2) == [Input(6, b"world"), CloseInput()]


async def test_input_that_comes_twice_is_taken_once():
    feed = InputFeed(source(Input(0, b"abc"), Input(1, b"bcd")))
    await feed.take_in()
    assert await collect(feed, 0, 1) == [Input(0, b"abcd")]


async def test_input_with_a_hole_is_refused():
    feed = InputFeed(source(Input(0, b"abc"), Input(9, b"x")))
    with pytest.raises(DataLoss):
        await feed.take_in()


async def test_input_that_began_behind_the_place_is_refused():
    feed = InputFeed(source(Input(5, b"abc")))
    await feed.take_in()
    with pytest.raises(DataLoss):
        await collect(feed, 0, 1)


async def test_only_the_last_size_is_given():
    feed = InputFeed(source(Resize(1, 1), Resize(2, 2)))
    await feed.take_in()
    assert await collect(feed, 0, 1) == [Resize(2, 2)]


async def test_a_client_is_not_read_while_much_of_it_waits():
    piece = b"x" * (1 << 20)
    taken = []

    async def endless():
        for number in range(10):
            taken.append(number)
            yield Input(number * len(piece), piece)

    feed = InputFeed(endless())
    reading = asyncio.create_task(feed.take_in())
    for _ in range(20):
        await asyncio.sleep(0)
    assert len(taken) < 4
    offset = 0
    generator = feed.give_out(at(0))
    async for part in generator:
        assert part.offset == offset
        offset += len(part.data)
        if offset == 10 * len(piece):
            break
    await generator.aclose()
    await reading


async def test_sessions_are_waited_for_within_a_limit():
    sessions = Sessions()
    assert await sessions.finish("x", timeout_s=0)
    with sessions.attached("x", "y"):
        assert sessions.count("x") == 1
        assert not await sessions.finish("x", timeout_s=0.01)
        waiting = asyncio.create_task(sessions.finish("y", timeout_s=10))
        await asyncio.sleep(0)
    assert await waiting
    assert sessions.count("x") == 0


async def test_operations_on_one_container_exclude_one_another():
    locks = OperationLocks()
    order = []

    async def work(key, number):
        async with locks.hold(key):
            order.append((key, number, "in"))
            await asyncio.sleep(0)
            order.append((key, number, "out"))

    await asyncio.gather(work("a", 1), work("a", 2), work("b", 3))
    mine = [entry for entry in order if entry[0] == "a"]
    assert mine == [("a", 1, "in"), ("a", 1, "out"), ("a", 2, "in"), ("a", 2, "out")]
    assert not locks._locks


async def test_uninterrupted_work_ends_although_its_caller_went_away():
    uninterrupted = OutlivingWork()
    done = asyncio.Event()
    release = asyncio.Event()

    async def work():
        await release.wait()
        done.set()

    caller = asyncio.create_task(uninterrupted.run(work(), name="work"))
    await asyncio.sleep(0)
    caller.cancel()
    await asyncio.gather(caller, return_exceptions=True)
    release.set()
    await uninterrupted.close()
    assert done.is_set()


def program(directory, name, text):
    path = directory / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


async def test_runtimes_that_cannot_be_used_are_named_with_the_reason(tmp_path):
    cgroups = tmp_path / "cgroup"
    (cgroups / "unified").mkdir(parents=True)
    (cgroups / "unified" / "cgroup.controllers").write_text("hugetlb\n")
    assert cgroup_layout(cgroups) == "hybrid"
    runtimes = OciRuntimes(
        {
            "runc": program(tmp_path, "runc", "echo runc version 1.1.5; echo commit: x"),
            "crun": program(tmp_path, "crun", "echo crun version 1.8.1"),
            "broken": program(tmp_path, "broken", "exit 3"),
            "mute": program(tmp_path, "mute", "exit 0"),
            "absent": "/nonexistent",
        },
        "runc",
        cgroups=cgroups,
    )
    await runtimes.probe()
    found = {runtime.name: runtime for runtime in runtimes.list_all()}
    assert (found["runc"].version, found["runc"].usable) == ("runc version 1.1.5", True)
    assert "hugetlb" in found["crun"].reason
    assert "exited with 3" in found["broken"].reason
    assert "told no version" in found["mute"].reason
    assert "there is no program" in found["absent"].reason
    assert runtimes.program("") == str(tmp_path / "runc")
    with pytest.raises(FailedPrecondition, match="runtime crun cannot be used"):
        runtimes.program("crun")
    with pytest.raises(InvalidArgument, match="unknown or invalid runtime name: x"):
        runtimes.program("x")
    (cgroups / "unified" / "cgroup.controllers").write_text("\n")
    await runtimes.probe()
    assert runtimes.program("crun") == str(tmp_path / "crun")


def test_the_command_line_makes_a_configuration(tmp_path):
    config = parse(
        [
            f"--root={tmp_path}/r",
            f"--state={tmp_path}/s",
            "--bridge-subnet=10.1.0.0/24",
            "--runtime=mine=/opt/mine",
            "--default-runtime=mine",
        ]
    )
    assert config.address == tmp_path / "s/daemon.sock"
    assert config.bridge_subnet == "10.1.0.1/24"
    assert config.runtimes["mine"] == "/opt/mine"
    assert set(config.runtimes) == {"runc", "crun", "mine"}


@pytest.mark.parametrize(
    "argument",
    [
        "--bridge-subnet=10.0.0.0/30",
        "--bridge-subnet=fd00::/64",
        "--bridge-subnet=x",
        "--runtime=mine",
        "--runtime==x",
        "--runtime=a=relative/path",
        "--default-runtime=nosuch",
    ],
)
def test_a_command_line_that_makes_no_sense_is_refused(argument):
    with pytest.raises(InvalidArgument):
        parse([argument])
