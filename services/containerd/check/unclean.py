"""What a start does that follows an end which nobody asked for: a kill, a power cut."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import structlog

from services.containerd.check import quick
from services.containerd.check.findings import Severity
from services.containerd.metadata import meta

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from services.common.database import Database
    from services.containerd.check.findings import Finding

log = structlog.get_logger(__name__)


@asynccontextmanager
async def run_noted(
    db: Database, root: Path, snapshotters: tuple[str, ...]
) -> AsyncIterator[list[Finding]]:
    """Note a run while the context lasts; gives what a quick check found before it.

    There is no check after a run whose end was noted, which one that fails is not. Enter it before
    anything is put right: afterwards nobody can tell what was wrong.
    """
    found = []
    if not await db.write(meta.begin_run):
        found = await quick.look(db, root, snapshotters)
        for finding in found:
            tell = log.error if finding.severity == Severity.DAMAGE else log.info
            tell("found after an unclean stop", finding=str(finding))
        damage = sum(finding.remains for finding in found)
        log.info("checked after an unclean stop", findings=len(found), damage=damage)
        if damage:
            log.error("stop the service and run theseus-containerd check --repair", damage=damage)
    yield found
    await db.write(meta.end_run)
