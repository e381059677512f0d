"""Directories of removed snapshots go behind the answers."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from services.common import background
from services.containerd.snapshots import discards as module
from services.containerd.snapshots.discards import Discards


class Thrown:
    """Takes directories, as long as it is let."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.free = threading.Event()
        self.free.set()

    def __call__(self, directory: Path) -> None:
        self.free.wait(10)
        self.paths.append(directory.name)


@pytest.fixture
def never_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "BEHIND_S", 60.0)


async def test_they_go_by_themselves() -> None:
    gone = asyncio.Event()
    loop = asyncio.get_running_loop()
    discards = Discards(lambda _: loop.call_soon_threadsafe(gone.set) and None)
    await discards.add(Path("a"))
    async with asyncio.timeout(5):
        await gone.wait()
    await discards.close()


@pytest.mark.usefixtures("never_by_itself")
async def test_whoever_waits_for_them_does_not_wait_for_the_pause() -> None:
    thrown = Thrown()
    discards = Discards(thrown)
    await discards.finish()  # nothing is there
    for round_ in ("ab", "cd"):
        for name in round_:
            await discards.add(Path(name))
        assert thrown.paths[-1:] != [round_[-1]]
        async with asyncio.timeout(5):
            await discards.finish()
    assert thrown.paths == ["a", "b", "c", "d"]
    await discards.close()


@pytest.mark.usefixtures("never_by_itself")
async def test_what_comes_while_others_go_is_waited_for_too() -> None:
    thrown = Thrown()
    thrown.free.clear()
    discards = Discards(thrown)
    await discards.add(Path("a"))
    finishing = asyncio.ensure_future(discards.finish())
    await asyncio.sleep(0)
    await discards.add(Path("b"))
    thrown.free.set()
    async with asyncio.timeout(5):
        await finishing
    assert thrown.paths == ["a", "b"]


@pytest.mark.usefixtures("never_by_itself")
async def test_very_many_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_WAITING_MAX", 2)
    thrown = Thrown()
    discards = Discards(thrown)
    async with asyncio.timeout(5):
        for name in "abc":
            await discards.add(Path(name))
    assert thrown.paths == ["a", "b", "c"]


@pytest.mark.usefixtures("never_by_itself")
async def test_the_end_removes_what_waits() -> None:
    thrown = Thrown()
    discards = Discards(thrown)
    await discards.add(Path("a"))
    await discards.close()
    assert thrown.paths == ["a"]
