"""``theseus-containerd check``: looks a root through that no service uses, and repairs it.

One line for each finding on stdout. Exit code 0: no damage, or none is left; 1: damage is left;
2: it could not be checked.
"""

from __future__ import annotations

import argparse
import asyncio
import sqlite3
import sys
import tempfile
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from services.common import log
from services.common.database import Database
from services.common.errors import FailedPrecondition, NotFound, TheseusError
from services.common.root_lock import RootLock
from services.containerd.check.checker import Checker
from services.containerd.config import REGISTRY_HOSTS
from services.containerd.content.local import LocalContentStore
from services.containerd.diff.local_applier import LocalApplier
from services.containerd.diff.pool import WorkerPool
from services.containerd.gc.lock import GcLock
from services.containerd.gc.mutations import UNHEARD
from services.containerd.leases.manager import LeaseManager
from services.containerd.metadata.schema import MIGRATIONS
from services.containerd.remotes.mirrors import DistributionRegistries
from services.containerd.snapshots.native import NativeSnapshotter
from services.containerd.snapshots.overlay import OverlaySnapshotter
from services.containerd.snapshots.recorded import SnapshotIds

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

    from services.containerd.check.findings import Finding

DAMAGED, NOT_CHECKED = 1, 2


class _NoEvents:
    """Nobody is there to be told."""

    def append(
        self,
        tx: sqlite3.Connection,
        namespace: str,
        topic: str,
        type_name: str,
        fields: Mapping[str, object],
    ) -> None:
        """See :class:`EventSink`."""


def main(arguments: Sequence[str]) -> int:
    """Run the program; returns its exit status."""
    given = parse(arguments)
    log.configure("containerd-check", given.log_level)
    try:
        findings = asyncio.run(_run(given))
    except (TheseusError, OSError, sqlite3.Error) as error:
        sys.stderr.write(f"theseus-containerd check: {error}\n")
        return NOT_CHECKED
    for finding in findings:
        sys.stdout.write(f"{finding}\n")
    left = sum(finding.remains for finding in findings)
    sys.stdout.write(f"{len(findings)} findings, {left} left\n")
    return DAMAGED if left else 0


async def _run(given: argparse.Namespace) -> list[Finding]:
    async with opened(given) as checker:
        return await (checker.quick() if given.quick else checker.full(repair=given.repair))


@asynccontextmanager
async def opened(given: argparse.Namespace) -> AsyncIterator[Checker]:
    """A checker of the root that a command line names, which belongs to it meanwhile.

    Raises:
        NotFound: there is none.
        FailedPrecondition: the root is in use.
    """
    root: Path = given.root.absolute()
    if not (root / "meta.db").exists():
        raise NotFound(f"there is no containerd's root at {root}: give one by --root")
    async with AsyncExitStack() as stack:
        try:
            await stack.enter_async_context(RootLock(root).held(0))
        except FailedPrecondition as error:
            raise FailedPrecondition(f"{error.message}; a root in use is not checked") from error
        db = Database(root / "meta.db")
        await asyncio.to_thread(db.open, MIGRATIONS)
        stack.push_async_callback(asyncio.to_thread, db.close)
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="theseus-check-")))
        workers = await stack.enter_async_context(WorkerPool(1))
        hosts = tuple(Path(part) for part in given.registry_hosts.split(":") if part)
        registries = await stack.enter_async_context(DistributionRegistries(hosts=hosts))
        events, ids = _NoEvents(), SnapshotIds()
        leases = LeaseManager(db, mutations=UNHEARD)
        store = LocalContentStore(root, db, events=events, gc_lock=GcLock())
        yield Checker(
            root,
            db,
            store=store,
            snapshotters=[
                kind(root, db, events=events, leases=leases, ids=ids)
                for kind in (OverlaySnapshotter, NativeSnapshotter)
            ],
            applier=LocalApplier(store, workers, scratch),
            registries=registries,
        )


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """What a command line asks for."""
    return _parser().parse_args(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="theseus-containerd check",
        description="Compares what is recorded with what is there: blobs with their digests, "
        "snapshots with their layers. The service must not run.",
    )
    add = parser.add_argument
    add("--root", type=Path, default=Path("/var/lib/theseus/containerd"), metavar="DIR")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--quick", action="store_true", help="names and sizes only")
    how.add_argument(
        "--repair",
        action="store_true",
        help="fetch damaged blobs again, unpack damaged layers anew, remove leftovers",
    )
    add("--registry-hosts", default=str(REGISTRY_HOSTS), metavar="DIR[:DIR...]")
    add("--log-level", choices=log.LEVELS, default="error")
    return parser
