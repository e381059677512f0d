"""One SQLite file with one writer: transactions run in threads, and commit in groups.

The event loop never waits for the disk: ``await db.write(fn)`` hands ``fn`` to the writer's thread,
which runs every function that is waiting in a savepoint of its own, commits once for all of them
(WAL, ``synchronous=FULL``: an fsync) and only then wakes their callers. A function that raises is
rolled back alone. Functions are plain, so a transaction can never span an await or another tier's
call. ``await db.read(fn)`` runs on a second connection, which sees the last commit, in a thread;
``db.look(fn)`` on a third one, on the loop, for a row or two.

On a full disk the reserve, if there is one, is released and the group of transactions run again:
functions must be fit for that, as they must for a rollback.

The schema's version is ``PRAGMA user_version``. Migrations run at open, each in its transaction,
after a copy of the file was put aside as ``<name>.v<N>.bak``.

The log (WAL) gets all of its length before it is written to. A commit that writes over what is
there takes one flush of the disk; one that makes the file longer has the file system commit its own
journal too, with all that others have changed there meanwhile.
"""

from __future__ import annotations

import asyncio
import os
import queue
import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import structlog

from services.common import tracing
from services.common.disk import free_bytes
from services.common.errors import FailedPrecondition, ResourceExhausted

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from services.common.disk import DiskReserve

log = structlog.get_logger(__name__)

T = TypeVar("T")
Transaction = sqlite3.Connection
"""What a function of ``write`` or ``read`` gets; rows come as ``sqlite3.Row``."""

_GROUP_MAX = 256
# What is in the log of 1000 pages is brought into the database (SQLITE_DEFAULT_WAL_AUTOCHECKPOINT),
# after the transaction that made it so long.
_LOG_BYTES = 1064 * (4096 + 24)
_ROOM_BYTES = 64 << 20  # a disk with less has better use for it
# What a full disk is to SQLite, in the database, its log and the index of that (sqlite3.h).
_DISK_FULL = (
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR_WRITE,
    sqlite3.SQLITE_IOERR_FSYNC,
    sqlite3.SQLITE_IOERR_TRUNCATE,
    sqlite3.SQLITE_IOERR_SHMSIZE,
    sqlite3.SQLITE_IOERR_SHMMAP,
)


class Database:
    """An open database file. ``open`` before use; ``close`` commits what waits.

    Args:
        path: the file.
        reserve: room for transactions on a full disk; None: there is none.
    """

    def __init__(self, path: Path, *, reserve: DiskReserve | None = None) -> None:
        self.path = path
        self._reserve = reserve
        self._requests: queue.SimpleQueue[
            tuple[Callable[[Transaction], Any], asyncio.Future[Any]] | None
        ] = queue.SimpleQueue()
        self._commit_listeners: list[Callable[[], Callable[[], object] | None]] = []
        self._writer: threading.Thread | None = None
        self._reader_pool = ThreadPoolExecutor(1, f"{path.stem}-reader")
        self._reader: sqlite3.Connection | None = None
        self._looker: sqlite3.Connection | None = None

    def open(self, migrations: Sequence[str], *, downgrades_from: int = 1) -> None:
        """Open the file, create it if need be, and bring its schema up to date. Blocks.

        Args:
            migrations: SQL scripts in order; the Nth brings version N-1 to version N.
            downgrades_from: how many versions newer than ours the file may be: a change of
                schema must leave what the version before it needs.

        Raises:
            FailedPrecondition: the file was written by a version that is too new.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o711)
        writer = _connect(self.path)
        try:
            self._migrate(writer, migrations, downgrades_from)
        except BaseException:
            writer.close()
            raise
        self._reader = _connect(self.path)
        self._looker = _connect(self.path)
        self._writer = threading.Thread(
            target=self._write_loop, args=(writer,), name=f"{self.path.stem}-writer", daemon=True
        )
        self._writer.start()

    def on_commit(self, listener: Callable[[], Callable[[], object] | None]) -> None:
        """Have ``listener`` called after each commit, in the writer's thread; it must be quick.

        What it returns, if anything, is called on the loop, when the writers' callers are woken.
        """
        self._commit_listeners.append(listener)

    async def write(self, function: Callable[[Transaction], T]) -> T:
        """Run ``function`` in a transaction; returns its result once that is on the disk."""
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        with tracing.span("commit", database=self.path.name):
            self._requests.put((function, future))
            # A caller that is cancelled does not undo a commit that is under way.
            return await asyncio.shield(future)

    async def read(self, function: Callable[[Transaction], T]) -> T:
        """Run ``function`` on a snapshot of the last commit; it must not write."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._reader_pool, self._read, function)

    def look(self, function: Callable[[Transaction], T]) -> T:
        """As :meth:`read`, at once and on the loop: for what takes a few rows by their keys.

        That is some 20 microseconds, a tenth of the way to a thread and back. Readers of a WAL
        never wait for the writer.
        """
        assert self._looker is not None, "the database is not open"
        return _run_snapshot(self._looker, function)

    def close(self) -> None:
        """Let waiting transactions commit, then close. Blocks."""
        self._requests.put(None)
        if self._writer is not None:
            self._writer.join()
        self._reader_pool.shutdown()
        for connection in (self._reader, self._looker):
            if connection is not None:
                connection.close()

    def _migrate(
        self, writer: sqlite3.Connection, migrations: Sequence[str], downgrades_from: int
    ) -> None:
        version = writer.execute("PRAGMA user_version").fetchone()[0]
        if version > len(migrations) + downgrades_from:
            raise FailedPrecondition(
                f"database {self.path} has schema version {version}, this program knows "
                f"{len(migrations)}: start a newer program, or restore the backup beside it"
            )
        if 0 < version < len(migrations):
            backup = sqlite3.connect(self.path.with_name(f"{self.path.name}.v{version}.bak"))
            writer.backup(backup)
            backup.close()
        for number in range(version, len(migrations)):
            stamp = f"PRAGMA user_version={number + 1}"
            writer.executescript(f"BEGIN IMMEDIATE;\n{migrations[number]};\n{stamp};\nCOMMIT;")

    def _read(self, function: Callable[[Transaction], T]) -> T:
        assert self._reader is not None, "the database is not open"
        return _run_snapshot(self._reader, function)

    def _write_loop(self, connection: sqlite3.Connection) -> None:
        _lengthen(self.path.with_name(f"{self.path.name}-wal"))
        running = True
        while running:
            group = [self._requests.get()]
            while len(group) < _GROUP_MAX and group[-1] is not None:
                try:
                    group.append(self._requests.get_nowait())
                except queue.Empty:
                    break
            if group[-1] is None:
                running = False
                group.pop()
            if group:
                self._commit_group(connection, [request for request in group if request])
        connection.close()

    def _commit_group(
        self,
        connection: sqlite3.Connection,
        group: list[tuple[Callable[[Transaction], Any], asyncio.Future[Any]]],
    ) -> None:
        try:
            try:
                outcomes = _run_group(connection, group)
            except sqlite3.Error as error:
                if not _is_disk_full(error) or self._reserve is None:
                    raise
                if not self._reserve.release():
                    raise
                outcomes = _run_group(connection, group)
        except sqlite3.Error as error:  # the disk is full, or I/O failed: nobody's write happened
            explained = self._explained(error)
            outcomes = [(future, None, explained) for _, future in group]
            heard = []
        else:
            heard = [listener() for listener in self._commit_listeners]
        # One wake-up for all: each is a write to a socket, and a turn of the loop.
        group[0][1].get_loop().call_soon_threadsafe(_wake, outcomes, heard)

    def _explained(self, error: sqlite3.Error) -> Exception:
        if not _is_disk_full(error):
            return error
        explained = ResourceExhausted(
            f"the disk of {self.path.parent} is full ({error}): make room there",
            reason="DISK_FULL",
        )
        explained.__cause__ = error
        return explained


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    connection.row_factory = sqlite3.Row
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("PRAGMA foreign_keys=ON")
    connection.execute("PRAGMA busy_timeout=5000")
    return connection


def _lengthen(log_file: Path) -> None:
    """Give a log its length; by its only writer, who is not at it. Blocks for some milliseconds.

    It ends for SQLite where a frame has a wrong checksum (fileformat2.html, 4.1), as zeros have.
    """
    fd = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        size = os.fstat(fd).st_size
        if size < _LOG_BYTES and free_bytes(log_file.parent) >= _ROOM_BYTES:
            os.pwrite(fd, bytes(_LOG_BYTES - size), size)
    except OSError as error:  # a quota, say: commits will tell if it matters
        log.info("database log grows with its commits", path=str(log_file), error=error.strerror)
    finally:
        os.close(fd)


def _run_group(
    connection: sqlite3.Connection,
    group: list[tuple[Callable[[Transaction], Any], asyncio.Future[Any]]],
) -> list[tuple[asyncio.Future[Any], Any, BaseException | None]]:
    """Run and commit a group: all of it, or nothing."""
    try:
        connection.execute("BEGIN IMMEDIATE")
        if len(group) == 1:  # the usual one
            return [_run_alone(connection, *group[0])]
        outcomes = [
            (future, *_run_in_savepoint(connection, function)) for function, future in group
        ]
        connection.execute("COMMIT")
    except sqlite3.Error:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
    return outcomes


def _run_alone(
    connection: sqlite3.Connection,
    function: Callable[[Transaction], Any],
    future: asyncio.Future[Any],
) -> tuple[asyncio.Future[Any], Any, BaseException | None]:
    """Run a function and end its transaction."""
    try:
        result = function(connection)
    except Exception as error:
        if _is_disk_full(error):
            raise  # SQLite may have rolled back by itself (lang_transaction.html)
        connection.execute("ROLLBACK")
        return future, None, error
    connection.execute("COMMIT")
    return future, result, None


def _is_disk_full(error: BaseException) -> bool:
    return isinstance(error, sqlite3.Error) and (
        getattr(error, "sqlite_errorcode", None) in _DISK_FULL
    )


def _run_snapshot(connection: sqlite3.Connection, function: Callable[[Transaction], T]) -> T:
    connection.execute("BEGIN")
    try:
        return function(connection)
    finally:
        connection.execute("ROLLBACK")


def _run_in_savepoint(
    connection: sqlite3.Connection, function: Callable[[Transaction], Any]
) -> tuple[Any, BaseException | None]:
    connection.execute("SAVEPOINT request")
    try:
        result, failure = function(connection), None
    except Exception as error:
        if _is_disk_full(error):
            raise  # SQLite may have rolled back all of the group by itself (lang_transaction.html)
        connection.execute("ROLLBACK TO request")
        result, failure = None, error
    connection.execute("RELEASE request")
    return result, failure


def _wake(
    outcomes: list[tuple[asyncio.Future[Any], Any, BaseException | None]],
    heard: list[Callable[[], object] | None],
) -> None:
    for call in heard:
        if call is not None:
            call()
    for future, result, failure in outcomes:
        if future.done():
            continue
        if failure is not None:
            future.set_exception(failure)
        else:
            future.set_result(result)
