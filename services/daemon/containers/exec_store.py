"""Records of exec sessions: in memory for readers, in the database for good, as containers are."""

from __future__ import annotations

import asyncio
import dataclasses
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from services.common.errors import NotFound
from services.daemon.containers import codec
from services.daemon.containers.outliving import OutlivingWork
from services.daemon.containers.record import (
    ContainerId,
    ExecId,
    ExecRecord,
    ExecState,
    ExitStatus,
)
from services.daemon.metadata import containers as rows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from services.common.database import Database, Transaction

T = TypeVar("T")


class ExecStore:
    """The exec sessions of one engine."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._records: dict[ExecId, ExecRecord] = {}
        self._waiters: dict[ExecId, set[asyncio.Event]] = {}
        self._commits = OutlivingWork()
        self._deleted: set[ExecId] = set()

    async def load(self) -> None:
        """Read everything; call once, first."""
        for row in await self._db.read(rows.list_execs):
            self.publish(codec.exec_record(row))

    def require(self, exec_id: str) -> ExecRecord:
        """The session of an id.

        Raises:
            NotFound: there is none, or its container has gone on without it.
        """
        record = self._records.get(ExecId(exec_id))
        if record is None:
            raise NotFound(f"No such exec instance: {exec_id}", resource=("exec", exec_id))
        return record

    def of(self, container_id: ContainerId) -> list[ExecRecord]:
        """All sessions of a container."""
        return [r for r in self._records.values() if r.container_id == container_id]

    async def put(self, record: ExecRecord) -> None:
        """Record a new session."""
        deleted, self._deleted = self._deleted, set()

        def write(tx: Transaction) -> list[ExecRecord]:
            rows.put_exec(tx, codec.exec_row(record))
            noted = [self.change_in(tx, exec_id, _as_deleted) for exec_id in deleted]
            return [record, *(changed for changed in noted if changed is not None)]

        await self._commit(write, self._publish_all)

    def note_deleted(self, exec_id: ExecId) -> None:
        """Note that containerd has forgotten the process; recorded together with the next session.

        After a crash before that it is deleted once more, which is no error.
        """
        self._deleted.add(exec_id)

    def is_deleted(self, exec_id: ExecId) -> bool:
        """Whether containerd has forgotten the process, as far as was noted."""
        record = self._records.get(exec_id)
        return exec_id in self._deleted or (record is not None and record.deleted)

    async def change(
        self, exec_id: ExecId, change: Callable[[ExecRecord], ExecRecord | None]
    ) -> ExecRecord:
        """Change a session; ``change`` is a plain function, and None leaves it.

        Raises:
            NotFound: there is none.
        """

        def apply(tx: Transaction) -> ExecRecord:
            changed = self.change_in(tx, exec_id, change)
            if changed is None:
                raise NotFound(f"No such exec instance: {exec_id}", resource=("exec", exec_id))
            return changed

        return await self._commit(apply, self.publish)

    def change_in(
        self,
        tx: Transaction,
        exec_id: str,
        change: Callable[[ExecRecord], ExecRecord | None],
    ) -> ExecRecord | None:
        """As :meth:`change` in somebody else's transaction, who publishes after the commit."""
        row = rows.get_exec(tx, exec_id)
        if row is None:
            return None
        present = codec.exec_record(row)
        following = change(present)
        if following is None or following == present:
            return present
        following = dataclasses.replace(following, revision=present.revision + 1)
        rows.put_exec(tx, codec.exec_row(following))
        return following

    def end_all_in(
        self, tx: Transaction, container_id: str, status: ExitStatus
    ) -> list[ExecRecord]:
        """End the sessions that a container's init took with it, in somebody's transaction."""
        ended = []
        for row in rows.execs_of(tx, container_id):
            record = codec.exec_record(row)
            if record.state is ExecState.EXITED:
                continue
            changed = self.change_in(tx, record.id, lambda present: end(present, status))
            if changed is not None:
                ended.append(changed)
        return ended

    async def forget(self, container_id: ContainerId) -> None:
        """Forget all sessions of a container, before its next run."""
        doomed = [record.id for record in self.of(container_id)]
        if not doomed:
            return

        def delete(tx: Transaction) -> list[ExecId]:
            rows.delete_execs(tx, doomed)
            return doomed

        await self._commit(delete, self._unpublish)

    def forget_removed(self, container_id: ContainerId) -> None:
        """Drop what memory has of the sessions of a container whose row is deleted."""
        self._unpublish([record.id for record in self.of(container_id)])

    def publish(self, record: ExecRecord) -> None:
        """Show a record that was committed; an older revision than the one shown is ignored."""
        present = self._records.get(record.id)
        if present is not None and present.revision > record.revision:
            return
        self._records[record.id] = record
        self._notify(record.id)

    def _publish_all(self, records: list[ExecRecord]) -> None:
        for record in records:
            self.publish(record)

    async def until(self, exec_id: str, condition: Callable[[ExecRecord], bool]) -> ExecRecord:
        """Wait until a session meets ``condition``.

        Raises:
            NotFound: there is none any more.
        """
        with self._watching(ExecId(exec_id)) as changed:
            while True:
                record = self.require(exec_id)
                if condition(record):
                    return record
                await changed.wait()
                changed.clear()

    async def close(self) -> None:
        """Wait until everything that was committed is shown."""
        await self._commits.close()

    @contextmanager
    def _watching(self, exec_id: ExecId) -> Iterator[asyncio.Event]:
        event = asyncio.Event()
        watchers = self._waiters.setdefault(exec_id, set())
        watchers.add(event)
        try:
            yield event
        finally:
            watchers.discard(event)
            if not watchers:
                self._waiters.pop(exec_id, None)

    async def _commit(self, write: Callable[[Transaction], T], show: Callable[[T], None]) -> T:
        async def work() -> T:
            result = await self._db.write(write)
            show(result)
            return result

        return await self._commits.run(work(), name="exec-commit")

    def _unpublish(self, ids: list[ExecId]) -> None:
        for exec_id in ids:
            self._records.pop(exec_id, None)
            self._notify(exec_id)

    def _notify(self, exec_id: ExecId) -> None:
        for event in self._waiters.get(exec_id, ()):
            event.set()


def _as_deleted(record: ExecRecord) -> ExecRecord:
    return dataclasses.replace(record, deleted=True)


def end(record: ExecRecord, status: ExitStatus) -> ExecRecord | None:
    """The session after its process ended with ``status``; None when that is known already."""
    if record.state is ExecState.EXITED:
        return None
    return dataclasses.replace(record, state=ExecState.EXITED, pid=0, exit=status)
