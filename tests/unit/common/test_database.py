"""Transactions in groups, migrations, and what a crash between them leaves."""

import asyncio
import sqlite3
import subprocess
import sys
import threading

import pytest

from services.common import database
from services.common.database import Database
from services.common.errors import FailedPrecondition

V1 = "CREATE TABLE things (name TEXT PRIMARY KEY)"
V2 = "ALTER TABLE things ADD COLUMN size INTEGER NOT NULL DEFAULT 7"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "root" / "t.db"


@pytest.fixture
def db(path):
    database = Database(path)
    database.open([V1])
    yield database
    database.close()


def insert(name):
    return lambda tx: tx.execute("INSERT INTO things VALUES (?)", (name,)).lastrowid


def names(tx):
    return [row["name"] for row in tx.execute("SELECT name FROM things ORDER BY name")]


async def test_a_failed_write_is_undone_alone(db):
    def broken(tx):
        insert("broken")(tx)
        raise ValueError("no")

    results = await asyncio.gather(
        db.write(insert("a")), db.write(broken), db.write(insert("b")), return_exceptions=True
    )
    assert isinstance(results[1], ValueError)
    assert await db.read(names) == ["a", "b"]


async def test_a_write_that_fails_by_itself_leaves_nothing(db):
    def broken(tx):
        insert("broken")(tx)
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await db.write(broken)
    assert db.look(names) == []
    await db.write(insert("a"))
    assert db.look(names) == ["a"]


async def test_what_a_commit_calls_for_is_called_on_the_loop_before_its_writer_goes_on(db):
    called = []
    db.on_commit(lambda: lambda: called.append(threading.current_thread()))
    db.on_commit(lambda: None)
    await db.write(insert("a"))
    assert called == [threading.current_thread()]


async def test_a_look_sees_what_is_committed_and_leaves_nothing_open(db):
    assert db.look(names) == []
    await db.write(insert("a"))
    assert db.look(names) == ["a"]
    with pytest.raises(ZeroDivisionError):
        db.look(lambda _: 1 // 0)
    await db.write(insert("b"))
    assert db.look(names) == ["a", "b"]


async def test_a_look_does_not_wait_for_a_write_under_way(db):
    begun, done = threading.Event(), threading.Event()

    def slow(tx):
        insert("a")(tx)
        begun.set()
        assert done.wait(10)

    writing = asyncio.ensure_future(db.write(slow))
    await asyncio.to_thread(begun.wait, 10)
    assert db.look(names) == []
    done.set()
    await writing
    assert db.look(names) == ["a"]


async def test_a_constraint_is_the_writers_own_error(db):
    await db.write(insert("a"))
    with pytest.raises(sqlite3.IntegrityError):
        await db.write(insert("a"))
    await db.write(insert("b"))
    assert await db.read(names) == ["a", "b"]


async def test_what_was_answered_is_in_the_file(db, path):
    await db.write(insert("a"))
    other = sqlite3.connect(path)
    assert other.execute("SELECT name FROM things").fetchall() == [("a",)]
    other.close()


WRITES_AND_DIES = """
import asyncio, os, sys
from pathlib import Path
from services.common.database import Database

async def main():
    db = Database(Path(sys.argv[1]))
    db.open(["CREATE TABLE things (name TEXT PRIMARY KEY)"])
    for number in range(int(sys.argv[2]), int(sys.argv[2]) + 300):
        await db.write(lambda tx: tx.execute("INSERT INTO things VALUES (?)", (f"{number:04}",)))
    os.kill(os.getpid(), 9)

asyncio.run(main())
"""


def test_commits_write_over_a_log_that_has_its_length_already(path):
    """Over deaths, too: what was committed is found before the zeros, and the log is used again."""
    log = path.with_name("t.db-wal")
    sizes = set()
    for first in (0, 300, 600, 900):
        command = [sys.executable, "-c", WRITES_AND_DIES, str(path), str(first)]
        assert subprocess.run(command, check=False).returncode == -9
        sizes.add(log.stat().st_size)
        reader = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
        assert names_of(reader) == [f"{number:04}" for number in range(first + 300)]
        reader.close()
    (size,) = sizes
    assert 4 << 20 < size < 5 << 20


def names_of(connection):
    return [name for (name,) in connection.execute("SELECT name FROM things ORDER BY name")]


async def test_the_log_is_left_as_it_is_where_there_is_little_room(path, monkeypatch):
    monkeypatch.setattr(database, "free_bytes", lambda _: (64 << 20) - 1)
    db = Database(path)
    db.open([V1])
    await db.write(insert("a"))
    assert path.with_name("t.db-wal").stat().st_size < 100_000
    db.close()


async def test_a_cancelled_caller_leaves_the_commit_alone(db):
    task = asyncio.create_task(db.write(insert("a")))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await db.write(insert("b"))
    assert await db.read(names) == ["a", "b"]


async def test_a_reader_cannot_write_by_accident(db):
    await db.read(insert("a"))
    assert await db.read(names) == []


async def test_many_writers_share_commits(db):
    await asyncio.gather(*(db.write(insert(f"{n:04}")) for n in range(1000)))
    assert len(await db.read(names)) == 1000


async def test_a_migration_keeps_the_rows_and_a_backup(db, path):
    await db.write(insert("a"))
    db.close()
    newer = Database(path)
    newer.open([V1, V2])
    rows = await newer.read(lambda tx: [tuple(r) for r in tx.execute("SELECT * FROM things")])
    newer.close()
    assert rows == [("a", 7)]
    backup = sqlite3.connect(f"{path}.v1.bak")
    assert backup.execute("SELECT * FROM things").fetchall() == [("a",)]
    backup.close()


def test_a_migration_that_fails_changes_nothing(db, path):
    db.close()
    broken = Database(path)
    with pytest.raises(sqlite3.OperationalError):
        broken.open([V1, V2 + "; CREATE NONSENSE"])
    again = Database(path)
    again.open([V1, V2])
    again.close()


@pytest.mark.parametrize(("newer_by", "opens"), [(1, True), (2, False)])
def test_the_version_before_still_opens_the_file(path, newer_by, opens):
    newer = Database(path)
    newer.open([V1, *["SELECT 1"] * newer_by])
    newer.close()
    old = Database(path)
    if opens:
        old.open([V1])
    else:
        with pytest.raises(FailedPrecondition, match="start a newer program"):
            old.open([V1])
    old.close()
