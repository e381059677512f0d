"""What every snapshotter has to do, run against each of them. No mount is done here."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from services.common.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Unimplemented,
)
from services.common.overlay_mounts import overlay_option
from services.containerd.snapshots.snapshotter import REBASE, Kind
from tests.fakes.snapshotters import open_snapshotter

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from services.common.mounts import Mount
    from services.containerd.snapshots.recorded import RecordedSnapshotter

NS = "test"


@pytest.fixture(params=["overlayfs", "native", "remote"])
async def snapshotter(
    request: pytest.FixtureRequest, tmp_path: Path
) -> AsyncIterator[RecordedSnapshotter]:
    async with open_snapshotter(tmp_path, request.param) as (found, _):
        yield found


def writable(mounts: list[Mount]) -> Path:
    """Where what is written through the mounts of an active snapshot ends up."""
    if mounts[-1].type == "bind":
        assert "rw" in mounts[-1].options
        return Path(mounts[-1].source)
    options = dict(option.partition("=")[::2] for option in mounts[-1].options)
    return Path(options["upperdir"])


def layers(mounts: list[Mount]) -> list[Path]:
    """The directories that mounts show, top first."""
    if mounts[-1].type == "bind":
        return [Path(mounts[-1].source)]
    found = [overlay_option(mounts[-1].options, "upperdir")]
    found += overlay_option(mounts[-1].options, "lowerdir").split(":")
    return [Path(path) for path in found if path]


async def committed(snapshotter: RecordedSnapshotter, name: str, parent: str = "") -> None:
    mounts = await snapshotter.prepare(NS, f"making {name}", parent)
    (writable(mounts) / name).write_text(name)
    await snapshotter.commit(NS, name, f"making {name}")


async def test_a_prepared_snapshot_is_active_and_stands_on_its_parent(
    snapshotter: RecordedSnapshotter,
) -> None:
    await committed(snapshotter, "base")
    before = time.time_ns()
    await snapshotter.prepare(NS, "work", "base", {"a": "b"})
    info = await snapshotter.stat(NS, "work")
    assert (info.name, info.kind, info.parent, dict(info.labels)) == (
        "work",
        Kind.ACTIVE,
        "base",
        {"a": "b"},
    )
    assert before <= info.created_at_ns == info.updated_at_ns <= time.time_ns()


async def test_mounts_are_those_of_prepare(snapshotter: RecordedSnapshotter) -> None:
    await committed(snapshotter, "base")
    for make in (snapshotter.prepare, snapshotter.view):
        for parent in ("", "base"):
            key = f"{make.__name__} {parent}"
            assert await make(NS, key, parent) == await snapshotter.mounts(NS, key)


async def test_commit_replaces_key_by_name_and_labels_by_new_ones(
    snapshotter: RecordedSnapshotter,
) -> None:
    await snapshotter.prepare(NS, "key", "", {"old": "1", "containerd.io/snapshot/x": "2"})
    await snapshotter.commit(NS, "name", "key", {"new": "3"})
    with pytest.raises(NotFound):
        await snapshotter.stat(NS, "key")
    info = await snapshotter.stat(NS, "name")
    assert info.kind == Kind.COMMITTED
    assert dict(info.labels) == {"new": "3"}


async def test_a_committed_snapshot_has_no_mounts_and_cannot_be_committed_again(
    snapshotter: RecordedSnapshotter,
) -> None:
    await committed(snapshotter, "base")
    with pytest.raises(FailedPrecondition, match="make a view"):
        await snapshotter.mounts(NS, "base")
    with pytest.raises(FailedPrecondition):
        await snapshotter.commit(NS, "other", "base")


async def test_a_view_cannot_be_committed(snapshotter: RecordedSnapshotter) -> None:
    await committed(snapshotter, "base")
    await snapshotter.view(NS, "look", "base")
    assert (await snapshotter.stat(NS, "look")).kind == Kind.VIEW
    with pytest.raises(FailedPrecondition):
        await snapshotter.commit(NS, "name", "look")


async def test_keys_and_names_share_one_space(snapshotter: RecordedSnapshotter) -> None:
    await committed(snapshotter, "base")
    await snapshotter.prepare(NS, "work", "base")
    for taken in ("base", "work"):
        with pytest.raises(AlreadyExists):
            await snapshotter.prepare(NS, taken, "")
        with pytest.raises(AlreadyExists):
            await snapshotter.view(NS, taken, "base")
        with pytest.raises(AlreadyExists):
            await snapshotter.commit(NS, taken, "work")
    assert (await snapshotter.stat(NS, "work")).kind == Kind.ACTIVE


async def test_namespaces_do_not_see_one_another(snapshotter: RecordedSnapshotter) -> None:
    await committed(snapshotter, "base")
    await snapshotter.prepare("other", "base", "")
    assert (await snapshotter.stat("other", "base")).kind == Kind.ACTIVE
    assert (await snapshotter.stat(NS, "base")).kind == Kind.COMMITTED
    with pytest.raises(InvalidArgument):
        await snapshotter.prepare("other", "work", "base")
    await snapshotter.remove("other", "base")
    assert [info.name for info in await snapshotter.infos(NS)] == ["base"]
    assert await snapshotter.infos("other") == []


async def test_a_parent_must_exist_and_be_committed(snapshotter: RecordedSnapshotter) -> None:
    with pytest.raises(NotFound, match="parent snapshot 'nowhere'"):
        await snapshotter.prepare(NS, "work", "nowhere")
    await snapshotter.prepare(NS, "active", "")
    with pytest.raises(InvalidArgument, match="not committed"):
        await snapshotter.prepare(NS, "work", "active")
    with pytest.raises(InvalidArgument, match="not committed"):
        await snapshotter.view(NS, "work", "active")


async def test_keys_and_names_must_not_be_empty(snapshotter: RecordedSnapshotter) -> None:
    with pytest.raises(InvalidArgument):
        await snapshotter.prepare(NS, "", "")
    with pytest.raises(InvalidArgument):
        await snapshotter.view(NS, "", "")
    await snapshotter.prepare(NS, "work", "")
    with pytest.raises(InvalidArgument):
        await snapshotter.commit(NS, "", "work")


async def test_what_others_stand_on_cannot_be_removed(snapshotter: RecordedSnapshotter) -> None:
    await committed(snapshotter, "base")
    await snapshotter.view(NS, "look", "base")
    await committed(snapshotter, "next", "base")
    for child in ("look", "next"):
        with pytest.raises(FailedPrecondition, match="stands on it"):
            await snapshotter.remove(NS, "base")
        await snapshotter.remove(NS, child)
    await snapshotter.remove(NS, "base")
    assert await snapshotter.infos(NS) == []


async def test_a_removed_key_is_free_at_once(snapshotter: RecordedSnapshotter) -> None:
    (writable(await snapshotter.prepare(NS, "work", "")) / "old").touch()
    await snapshotter.remove(NS, "work")
    assert list(writable(await snapshotter.prepare(NS, "work", "")).iterdir()) == []


async def test_what_is_not_there_is_not_found(snapshotter: RecordedSnapshotter) -> None:
    for call in (snapshotter.stat, snapshotter.usage, snapshotter.mounts, snapshotter.remove):
        with pytest.raises(NotFound, match="'nothing'"):
            await call(NS, "nothing")
    with pytest.raises(NotFound):
        await snapshotter.update(NS, "nothing", {})
    with pytest.raises(NotFound):
        await snapshotter.commit(NS, "name", "nothing")


async def test_update_changes_labels_by_mask(snapshotter: RecordedSnapshotter) -> None:
    await snapshotter.prepare(NS, "work", "", {"a": "1", "b": "2", "c.d/e": "3"})
    created = await snapshotter.stat(NS, "work")
    info = await snapshotter.update(NS, "work", {"a": "x", "c.d/e": "y"}, ["labels.c.d/e"])
    assert dict(info.labels) == {"a": "1", "b": "2", "c.d/e": "y"}
    info = await snapshotter.update(NS, "work", {}, ["labels.a"])
    assert dict(info.labels) == {"b": "2", "c.d/e": "y"}
    info = await snapshotter.update(NS, "work", {"z": "1"}, ["labels"])
    assert dict(info.labels) == {"z": "1"}
    info = await snapshotter.update(NS, "work", {"only": "1"})
    assert dict(info.labels) == {"only": "1"}
    with pytest.raises(InvalidArgument, match="'parent'"):
        await snapshotter.update(NS, "work", {}, ["parent"])
    assert await snapshotter.stat(NS, "work") == info
    assert info.created_at_ns == created.created_at_ns < info.updated_at_ns


async def test_a_label_has_a_limit(snapshotter: RecordedSnapshotter) -> None:
    with pytest.raises(InvalidArgument, match="4096"):
        await snapshotter.prepare(NS, "work", "", {"a": "x" * 4096})
    assert await snapshotter.infos(NS) == []


async def test_parents_are_listed_before_children(snapshotter: RecordedSnapshotter) -> None:
    await committed(snapshotter, "z")
    await committed(snapshotter, "m", "z")
    await committed(snapshotter, "a", "m")
    await snapshotter.prepare(NS, "0", "a")
    assert [i.name for i in await snapshotter.infos(NS)] == ["z", "m", "a", "0"]


async def test_usage_counts_what_the_snapshot_holds_itself(
    snapshotter: RecordedSnapshotter,
) -> None:
    base = writable(await snapshotter.prepare(NS, "key", ""))
    empty = await snapshotter.usage(NS, "key")
    (base / "big").write_bytes(b"x" * 100_000)
    (base / "linked").hardlink_to(base / "big")
    (base / "dir").mkdir()
    full = await snapshotter.usage(NS, "key")
    assert full.inodes == empty.inodes + 2
    assert 100_000 <= full.size_bytes - empty.size_bytes < 200_000
    await snapshotter.commit(NS, "base", "key")
    assert await snapshotter.usage(NS, "base") == full
    await snapshotter.prepare(NS, "child", "base")
    child = await snapshotter.usage(NS, "child")
    if snapshotter.name == "native":  # which holds copies of its parent's files
        assert child == full
    else:
        assert child.size_bytes <= empty.size_bytes


async def test_the_root_of_a_snapshot_looks_like_its_parents(
    snapshotter: RecordedSnapshotter,
) -> None:
    base = writable(await snapshotter.prepare(NS, "key", ""))
    assert base.stat().st_mode & 0o7777 == 0o755
    base.chmod(0o1750)
    await snapshotter.commit(NS, "base", "key")
    child = writable(await snapshotter.prepare(NS, "child", "base"))
    assert child.stat().st_mode & 0o7777 == 0o1750


async def test_commit_can_put_a_snapshot_on_a_parent(snapshotter: RecordedSnapshotter) -> None:
    await committed(snapshotter, "base")
    await committed(snapshotter, "other")
    await snapshotter.prepare(NS, "active", "")
    await snapshotter.prepare(NS, "key", "")
    with pytest.raises(NotFound):
        await snapshotter.commit(NS, "name", "key", parent="nowhere")
    with pytest.raises(FailedPrecondition):
        await snapshotter.commit(NS, "name", "key", parent="active")
    if REBASE not in snapshotter.capabilities:
        with pytest.raises(Unimplemented, match="on its parent"):
            await snapshotter.commit(NS, "name", "key", parent="base")
        assert (await snapshotter.stat(NS, "key")).kind == Kind.ACTIVE
        return
    await snapshotter.commit(NS, "name", "key", parent="base")
    assert (await snapshotter.stat(NS, "name")).parent == "base"
    with pytest.raises(FailedPrecondition):
        await snapshotter.remove(NS, "base")
    await snapshotter.prepare(NS, "second", "base")
    with pytest.raises(InvalidArgument, match="cannot move"):
        await snapshotter.commit(NS, "moved", "second", parent="other")
    await snapshotter.commit(NS, "same", "second", parent="base")
    assert (await snapshotter.stat(NS, "same")).parent == "base"


async def test_of_many_who_want_one_name_one_gets_it(snapshotter: RecordedSnapshotter) -> None:
    keys = [f"key {number}" for number in range(8)]
    await asyncio.gather(*(snapshotter.prepare(NS, key, "") for key in keys))
    outcomes = await asyncio.gather(
        *(snapshotter.commit(NS, "name", key) for key in keys), return_exceptions=True
    )
    assert sorted(type(outcome).__name__ for outcome in outcomes) == [
        *["AlreadyExists"] * 7,
        "NoneType",
    ]
    outcomes2 = await asyncio.gather(
        *(snapshotter.prepare(NS, "same", "") for _ in keys), return_exceptions=True
    )
    assert sum(isinstance(outcome, AlreadyExists) for outcome in outcomes2) == 7


async def test_cleanup_leaves_what_is_recorded_and_what_is_being_made(
    snapshotter: RecordedSnapshotter,
) -> None:
    await committed(snapshotter, "base")
    keys = [f"key {number}" for number in range(20)]

    async def clean() -> None:
        for _ in range(20):
            await snapshotter.cleanup()

    async with asyncio.TaskGroup() as group:
        group.create_task(clean())
        for key in keys:
            group.create_task(snapshotter.prepare(NS, key, "base"))
    for key in keys:
        assert writable(await snapshotter.mounts(NS, key)).is_dir()
    await snapshotter.view(NS, "look", "base")
    assert (Path((await snapshotter.mounts(NS, "look"))[0].source) / "base").read_text() == "base"


async def test_what_a_parent_has_is_under_what_stands_on_it(
    snapshotter: RecordedSnapshotter,
) -> None:
    await committed(snapshotter, "one")
    await committed(snapshotter, "two", "one")
    mounts = await snapshotter.prepare(NS, "work", "two")
    shown = {path.name for layer in layers(mounts) for path in layer.iterdir()}
    assert shown == {"one", "two"}
    (writable(mounts) / "one").write_text("changed")
    (look,) = await snapshotter.view(NS, "look", "one")
    assert (layers([look])[0] / "one").read_text() == "one"


async def test_ids_are_shared_and_namespaces_are_made(snapshotter: RecordedSnapshotter) -> None:
    for number in range(3):
        await snapshotter.prepare(f"space{number}", "key", "")
    sources = {writable(await snapshotter.mounts(f"space{n}", "key")) for n in range(3)}
    assert len(sources) == 3
