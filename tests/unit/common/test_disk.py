"""The reserve of a disk, its floor, and a database on a disk that is full."""

from __future__ import annotations

import asyncio
import subprocess
from typing import TYPE_CHECKING

import pytest

from services.common.database import Database
from services.common.disk import NO_FLOOR, DiskFloor, DiskReserve, free_bytes
from services.common.errors import ResourceExhausted
from tests.fakes.disk import fill

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MIB = 1 << 20
SCHEMA = "CREATE TABLE things (name TEXT PRIMARY KEY, data BLOB)"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", place], check=True)
    yield place
    subprocess.run(["umount", place], check=True)


@pytest.mark.root
def test_a_reserve_holds_room_and_gives_it_back(disk: Path) -> None:
    reserve = DiskReserve(disk / "reserve", 2 * MIB)
    assert not reserve.release()
    assert reserve.hold() and reserve.hold()
    assert free_bytes(disk) <= 6 * MIB
    fill(disk / "filler")
    assert free_bytes(disk) == 0
    assert reserve.release() and not reserve.release()
    assert free_bytes(disk) == 2 * MIB
    assert not reserve.hold()  # there is no room for it, and for what it is for
    (disk / "filler").unlink()
    assert reserve.hold()


@pytest.mark.root
def test_a_start_on_a_full_disk_releases_the_reserve(disk: Path) -> None:
    reserve = DiskReserve(disk / "reserve", 2 * MIB)
    reserve.hold()
    reserve.settle()
    assert reserve.path.exists()
    fill(disk / "filler")
    reserve.settle()
    assert free_bytes(disk) == 2 * MIB


def test_no_reserve_is_none(tmp_path: Path) -> None:
    reserve = DiskReserve(tmp_path / "reserve", 0)
    assert not reserve.hold() and not reserve.release()
    assert not reserve.path.exists()


def test_half_a_reserve_is_completed(tmp_path: Path) -> None:
    reserve = DiskReserve(tmp_path / "reserve", MIB)
    reserve.path.write_bytes(b"x")
    assert reserve.hold()
    assert reserve.path.stat().st_size == MIB


def insert(name: str, size: int):
    return lambda tx: tx.execute("INSERT INTO things VALUES (?, ?)", (name, bytes(size)))


def delete(name: str):
    return lambda tx: tx.execute("DELETE FROM things WHERE name = ?", (name,)).rowcount


def names(tx):
    return [row["name"] for row in tx.execute("SELECT name FROM things ORDER BY name")]


@pytest.mark.root
async def test_a_database_on_a_full_disk_uses_the_reserve_and_then_says_so(disk: Path) -> None:
    reserve = DiskReserve(disk / "reserve", 2 * MIB)
    db = Database(disk / "t.db", reserve=reserve)
    db.open([SCHEMA])
    await db.write(insert("first", 1000))
    assert reserve.hold()
    fill(disk / "filler")
    # A group of several, of which one would have failed by itself.
    results = await asyncio.gather(
        db.write(insert("second", 100_000)),
        db.write(insert("first", 1)),
        db.write(insert("third", 100_000)),
        return_exceptions=True,
    )
    assert "UNIQUE" in str(results[1])
    assert await db.read(names) == ["first", "second", "third"]
    assert not reserve.path.exists()
    fill(disk / "filler2")
    with pytest.raises(ResourceExhausted, match="is full"):
        await db.write(insert("fourth", 4 * MIB))
    assert await db.read(names) == ["first", "second", "third"]
    (disk / "filler2").unlink()
    assert await db.write(delete("second")) == 1
    db.close()
    db = Database(disk / "t.db")
    db.open([SCHEMA])
    assert await db.read(names) == ["first", "third"]
    assert await db.read(lambda tx: tx.execute("PRAGMA integrity_check").fetchone()[0]) == "ok"
    db.close()


@pytest.mark.root
async def test_without_a_reserve_a_full_disk_is_told(disk: Path) -> None:
    db = Database(disk / "t.db")
    db.open([SCHEMA])
    fill(disk / "filler")
    with pytest.raises(ResourceExhausted, match="make room there"):
        await db.write(insert("a", MIB))
    (disk / "filler").unlink()
    await db.write(insert("a", MIB))
    db.close()


def test_a_floor_refuses_in_figures(tmp_path: Path) -> None:
    free = free_bytes(tmp_path)
    DiskFloor(tmp_path, MIB).require()
    DiskFloor(tmp_path, 0).require(1 << 60)
    NO_FLOOR.require(1 << 60)
    with pytest.raises(ResourceExhausted, match=r"MiB free, 1048576\.0 MiB are wanted, and 1\.0"):
        DiskFloor(tmp_path, MIB).require(1 << 40)
    with pytest.raises(ResourceExhausted, match="must stay free") as refused:
        DiskFloor(tmp_path, free * 2).require()
    assert refused.value.reason == "DISK_FULL"
