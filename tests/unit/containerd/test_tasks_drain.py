"""What is on a shim's spool when it is taken away goes into the journal, and nothing twice."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from services.containerd.clients.shim_events import ShimEventCodec
from services.containerd.tasks.bundle import Bundle
from services.containerd.tasks.journal import TaskJournal
from services.containerd.tasks.known import KnownShim, Standing
from services.containerd.tasks.undertaker import Undertaker
from tests.fakes.metadata import open_metadata

if TYPE_CHECKING:
    from pathlib import Path

INSTANCE = "ab" * 16


def spool(bundle: Bundle, seq: int, status: int) -> None:
    directory = bundle.path / "spool"
    directory.mkdir(parents=True, exist_ok=True)
    fields = {"container_id": "c", "id": "c", "pid": 7, "exit_status": status, "exited_at_ns": 5}
    event = {"seq": seq, "timestamp_ns": 5, "topic": "/tasks/exit", "fields": fields}
    (directory / str(seq)).write_text(json.dumps(event))


async def test_a_spool_that_is_in_the_journal_already_costs_no_commit(tmp_path: Path) -> None:
    bundle = Bundle("test", "c", tmp_path / "bundle")
    async with open_metadata(tmp_path) as meta:
        journal = TaskJournal(meta.db, meta.journal, ShimEventCodec())
        undertaker = Undertaker(journal)
        commits: list[None] = []
        meta.db.on_commit(lambda: commits.append(None))

        def known() -> KnownShim:
            return KnownShim(bundle, INSTANCE, Standing.REMOVING)

        await undertaker.drain(known())  # nothing there
        assert len(commits) == 0
        spool(bundle, 1, 3)
        shim = known()
        await undertaker.drain(shim)
        assert (len(commits), shim.exits[""].exit_status) == (1, 3)
        shim = known()
        await undertaker.drain(shim)
        assert (len(commits), shim.exits[""].exit_status) == (1, 3)
        spool(bundle, 2, 4)
        await undertaker.drain(known())
        assert len(commits) == 2
        seen = [entry.seq async for entry in meta.journal.read(follow=False)]
        assert seen == [1, 2]
