"""What is particular to overlayfs: mounts, crash order, events, leases."""

from __future__ import annotations

import errno
import sqlite3
from contextlib import nullcontext
from typing import TYPE_CHECKING

import pytest

from services.common.database import Database
from services.common.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
)
from services.common.overlay_mounts import overlay_option
from services.containerd.metadata.schema import MIGRATIONS
from services.containerd.snapshots.overlay import OverlaySnapshotter
from services.containerd.snapshots.recorded import TARGET_LABEL
from services.containerd.snapshots.snapshotter import Kind
from tests.fakes.snapshot_collaborators import RecordedEvents, RecordedLeases

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

NS = "test"


class Crash(Exception):
    pass


class Node:
    """A snapshotter on a database, which can be stopped at a step and started again."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.events = RecordedEvents()
        self.leases = RecordedLeases()
        self.stop_at = ""
        self.db = Database(root / "meta.db")

    async def start(self) -> OverlaySnapshotter:
        self.db.open(MIGRATIONS)
        snapshotter = OverlaySnapshotter(
            self.root, self.db, events=self.events, leases=self.leases, trace=self._trace
        )
        await snapshotter.open()
        return snapshotter

    async def restart(self) -> OverlaySnapshotter:
        self.stop_at = ""
        self.db.close()
        self.db = Database(self.root / "meta.db")
        return await self.start()

    def directories(self) -> list[str]:
        return sorted(path.name for path in (self.root / "snapshots/overlayfs").iterdir())

    def _trace(self, step: str) -> None:
        if step == self.stop_at:
            raise Crash(step)


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    node = Node(tmp_path)
    yield node
    node.db.close()


@pytest.fixture
async def overlay(node: Node) -> OverlaySnapshotter:
    return await node.start()


def files(node: Node, number: int) -> str:
    return f"{node.root}/snapshots/overlayfs/{number}/fs"


async def test_mounts_are_as_upstreams(node: Node, overlay: OverlaySnapshotter) -> None:
    (active,) = await overlay.prepare(NS, "1", "")
    assert (active.type, active.source, active.options) == ("bind", files(node, 1), ("rw", "rbind"))
    await overlay.commit(NS, "one", "1")
    (active,) = await overlay.prepare(NS, "2", "one")
    assert (active.type, active.source) == ("overlay", "overlay")
    assert active.options[:3] == (
        f"workdir={node.root}/snapshots/overlayfs/2/work",
        f"upperdir={files(node, 2)}",
        f"lowerdir={files(node, 1)}",
    )
    await overlay.commit(NS, "two", "2")
    (active,) = await overlay.prepare(NS, "3", "two")
    assert overlay_option(active.options, "lowerdir") == f"{files(node, 2)}:{files(node, 1)}"
    (view,) = await overlay.view(NS, "v0", "")
    assert (view.type, view.source, view.options) == ("bind", files(node, 4), ("ro", "rbind"))
    (view,) = await overlay.view(NS, "v1", "one")
    assert (view.type, view.source, view.options) == ("bind", files(node, 1), ("ro", "rbind"))
    (view,) = await overlay.view(NS, "v2", "two")
    assert view.type == "overlay"
    assert view.options[0] == f"lowerdir={files(node, 2)}:{files(node, 1)}"
    assert not any(option.startswith(("upperdir", "workdir")) for option in view.options)


async def test_a_crash_after_the_directory_leaves_rubbish_that_cleanup_takes(
    node: Node, overlay: OverlaySnapshotter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        overlay, "_throw_away", lambda directory: None
    )  # a dead process undoes nothing
    node.stop_at = "directory made"
    with pytest.raises(Crash):
        await overlay.prepare(NS, "work", "")
    assert node.directories() == ["1"]
    overlay = await node.restart()
    with pytest.raises(NotFound):
        await overlay.stat(NS, "work")
    (mount,) = await overlay.prepare(NS, "work", "")
    assert mount.source == files(node, 2)
    await overlay.cleanup()
    assert node.directories() == ["2"]


async def test_directories_are_removed_behind_the_answer_all_at_once(
    node: Node, overlay: OverlaySnapshotter
) -> None:
    for key in "abc":
        await overlay.prepare(NS, key, "")
    for key in "abc":
        await overlay.remove(NS, key)
    assert node.directories() == ["1", "2", "3"]
    await overlay.cleanup()  # the disk is free when this returns
    assert node.directories() == []


async def test_directories_are_made_once_if_the_transaction_is_run_again(
    tmp_path: Path,
) -> None:
    class Reserve:
        released = False

        def release(self) -> bool:
            self.released = True
            return True

    node, reserve = Node(tmp_path), Reserve()
    node.db = Database(tmp_path / "meta.db", reserve=reserve)  # type: ignore[arg-type]
    overlay = await node.start()
    append = node.events.append

    def full(*arguments: object) -> None:
        if not reserve.released:
            error = sqlite3.OperationalError("database or disk is full")
            error.sqlite_errorcode = sqlite3.SQLITE_FULL
            raise error
        append(*arguments)  # type: ignore[arg-type]

    node.events.append = full  # type: ignore[assignment,method-assign]
    await overlay.prepare(NS, "work", "")
    assert reserve.released
    assert node.directories() == ["1"]
    assert (await overlay.stat(NS, "work")).kind == Kind.ACTIVE
    node.db.close()


async def test_no_room_for_directories_is_said_so_and_leaves_nothing(
    node: Node, overlay: OverlaySnapshotter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_arguments: object, **_options: object) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("services.containerd.snapshots.tree.make", full)
        with pytest.raises(ResourceExhausted, match="no room"):
            await overlay.prepare(NS, "work", "")
    with pytest.raises(NotFound):
        await overlay.stat(NS, "work")
    assert node.directories() == []
    await overlay.prepare(NS, "work", "")


async def test_a_failed_prepare_leaves_no_directory(
    node: Node, overlay: OverlaySnapshotter
) -> None:
    node.stop_at = "directory made"
    with pytest.raises(Crash):
        await overlay.prepare(NS, "work", "")
    assert node.directories() == []


async def test_a_crash_before_the_commits_row_leaves_the_snapshot_active(
    node: Node, overlay: OverlaySnapshotter
) -> None:
    await overlay.prepare(NS, "work", "")
    node.stop_at = "synced"
    with pytest.raises(Crash):
        await overlay.commit(NS, "name", "work")
    overlay = await node.restart()
    assert (await overlay.stat(NS, "work")).kind == Kind.ACTIVE
    await overlay.commit(NS, "name", "work")
    assert (await overlay.stat(NS, "name")).kind == Kind.COMMITTED


@pytest.mark.parametrize("step", ["row deleted", "put aside"])
async def test_a_crash_while_removing_leaves_rubbish_that_cleanup_takes(
    node: Node, overlay: OverlaySnapshotter, step: str
) -> None:
    await overlay.prepare(NS, "keep", "")
    (mount,) = await overlay.prepare(NS, "work", "")
    node.stop_at = step
    with pytest.raises(Crash) if step == "row deleted" else nullcontext():
        await overlay.remove(NS, "work")
    await overlay.close()  # as far as it comes
    overlay = await node.restart()
    with pytest.raises(NotFound):
        await overlay.stat(NS, "work")
    assert len(node.directories()) == 2
    await overlay.cleanup()
    assert node.directories() == ["1"]
    (again,) = await overlay.prepare(NS, "work", "")
    assert again.source != mount.source


async def test_open_makes_lost_directories_again(node: Node, overlay: OverlaySnapshotter) -> None:
    (base,) = await overlay.prepare(NS, "key", "")
    (node.root / base.source).chmod(0o711)
    await overlay.commit(NS, "base", "key")
    await overlay.prepare(NS, "work", "base")
    await overlay.view(NS, "look", "base")
    for number in (2, 3):
        directory = node.root / f"snapshots/overlayfs/{number}"
        for child in directory.iterdir():
            child.rmdir()
        directory.rmdir()
    await node.restart()
    work = node.root / "snapshots/overlayfs/2"
    assert (work / "fs").stat().st_mode & 0o777 == 0o711
    assert (work / "work").is_dir()
    assert [path.name for path in (node.root / "snapshots/overlayfs/3").iterdir()] == ["fs"]


async def test_ids_are_never_used_twice(node: Node, overlay: OverlaySnapshotter) -> None:
    for number in range(1, 4):
        (mount,) = await overlay.prepare(NS, "work", "")
        assert mount.source == files(node, number)
        await overlay.remove(NS, "work")
        await overlay.close()
        assert node.directories() == []
        overlay = await node.restart()


async def test_removal_goes_on_after_a_failure(
    node: Node, overlay: OverlaySnapshotter, monkeypatch: pytest.MonkeyPatch
) -> None:
    await overlay.prepare(NS, "work", "")

    def fail(directory: Path) -> None:
        raise PermissionError(1, "not permitted", str(directory))

    with monkeypatch.context() as patch:
        patch.setattr("services.containerd.snapshots.tree.remove", fail)
        await overlay.remove(NS, "work")
        await overlay.close()
    assert [name.startswith("rm-1-") for name in node.directories()] == [True]
    await overlay.cleanup()
    assert node.directories() == []


async def test_events_tell_of_prepare_commit_and_remove(
    node: Node, overlay: OverlaySnapshotter
) -> None:
    await overlay.prepare(NS, "key", "")
    await overlay.commit(NS, "base", "key")
    await overlay.view(NS, "look", "base")
    await overlay.prepare(NS, "work", "base")
    with pytest.raises(FailedPrecondition):
        await overlay.remove(NS, "base")
    await overlay.remove(NS, "work")
    own = {"snapshotter": "overlayfs"}
    event = "containerd.events.Snapshot"
    assert node.events.events == [
        (NS, "/snapshot/prepare", f"{event}Prepare", {"key": "key", "parent": "", **own}),
        (NS, "/snapshot/commit", f"{event}Commit", {"key": "key", "name": "base", **own}),
        (NS, "/snapshot/prepare", f"{event}Prepare", {"key": "work", "parent": "base", **own}),
        (NS, "/snapshot/remove", f"{event}Remove", {"key": "work", **own}),
    ]


async def test_snapshots_go_under_the_current_lease(
    node: Node, overlay: OverlaySnapshotter
) -> None:
    kind = "snapshots/overlayfs"
    node.leases.lease = "a"
    await overlay.prepare(NS, "key", "")
    assert node.leases.held == {(NS, "a", kind, "key")}
    await overlay.commit(NS, "base", "key")
    assert node.leases.held == {(NS, "a", kind, "base")}
    node.leases.lease = "b"
    with pytest.raises(AlreadyExists):
        await overlay.prepare(NS, "base", "")
    assert (NS, "b", kind, "base") in node.leases.held
    await overlay.remove(NS, "base")
    assert node.leases.held == set()


async def test_prepare_says_that_its_target_exists(node: Node, overlay: OverlaySnapshotter) -> None:
    await overlay.prepare(NS, "key", "", {TARGET_LABEL: "chain"})
    await overlay.commit(NS, "chain", "key")
    node.leases.lease = "b"
    with pytest.raises(AlreadyExists, match="'chain'"):
        await overlay.prepare(NS, "again", "", {TARGET_LABEL: "chain"})
    assert node.leases.held == {(NS, "b", "snapshots/overlayfs", "chain")}
    assert node.directories() == ["1"]


@pytest.mark.parametrize("character", [":", ",", "\\"])
async def test_a_root_that_mount_options_cannot_carry_is_refused(
    tmp_path: Path, character: str
) -> None:
    with pytest.raises(InvalidArgument, match="path"):
        OverlaySnapshotter(
            tmp_path / f"a{character}b",
            Database(tmp_path / "meta.db"),
            events=RecordedEvents(),
            leases=RecordedLeases(),
        )


@pytest.mark.root
async def test_labels_give_the_root_of_a_user_namespace_its_files(
    node: Node, overlay: OverlaySnapshotter
) -> None:
    def labels(uids: str) -> dict[str, str]:
        prefix = "containerd.io/snapshot/"
        return {f"{prefix}uidmapping": uids, f"{prefix}gidmapping": "1:5:1,0:2000:65536"}

    (mount,) = await overlay.prepare(NS, "work", "", labels("0:1000:65536"))
    status = (node.root / mount.source).stat()
    assert (status.st_uid, status.st_gid) == (1000, 2000)
    for bad in ("1:1000:65536", "nonsense", "0:1:0"):
        with pytest.raises(InvalidArgument, match="maps"):
            await overlay.prepare(NS, bad, "", labels(bad))
    assert node.directories() == ["1"]
