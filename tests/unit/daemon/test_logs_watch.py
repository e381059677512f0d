"""Learning that a directory has changed, with inotify and without."""

from __future__ import annotations

import asyncio
import errno
import shutil

import pytest

from services.common import linux
from services.daemon.containers import directory_watch
from services.daemon.containers.directory_watch import DirectoryWatch


@pytest.fixture
async def watch():
    made = DirectoryWatch()
    yield made
    made.close()


async def hears(changed):
    async with asyncio.timeout(10):
        await changed.wait()
    changed.clear()


async def test_every_reader_of_a_directory_is_told(watch, tmp_path):
    one, two, other = asyncio.Event(), asyncio.Event(), asyncio.Event()
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with watch.watching(tmp_path / "a", one), watch.watching(tmp_path / "b", other):
        with watch.watching(tmp_path / "a", two):
            (tmp_path / "a" / "log").write_text("x")
            await hears(one)
            await hears(two)
        (tmp_path / "a" / "log").write_text("xx")
        await hears(one)
        assert not two.is_set()
        assert not other.is_set()
        (tmp_path / "b" / "log").write_text("x")
        await hears(other)
    assert not watch._watchers


async def test_a_directory_that_goes_or_never_was_is_no_error(watch, tmp_path):
    (tmp_path / "a").mkdir()
    changed = asyncio.Event()
    with watch.watching(tmp_path / "a", changed):
        shutil.rmtree(tmp_path / "a")
    with watch.watching(tmp_path / "nonexistent", changed):
        pass


async def test_without_inotify_readers_look_from_time_to_time(watch, tmp_path, monkeypatch):
    def refuse():
        raise OSError(errno.EMFILE, "Too many open files", "inotify_init1")

    monkeypatch.setattr(linux, "inotify_init", refuse)
    monkeypatch.setattr(directory_watch, "_LOOK_AGAIN_S", 0.01)
    changed = asyncio.Event()
    with watch.watching(tmp_path, changed):
        await hears(changed)
        await hears(changed)
    await asyncio.sleep(0.05)
    assert not changed.is_set()
