"""What is particular to native snapshots: copies that cannot be told from what they are of."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
from typing import TYPE_CHECKING

import pytest

from services.common.database import Database
from services.common.errors import ResourceExhausted
from services.containerd.metadata.schema import MIGRATIONS
from services.containerd.snapshots import copy
from services.containerd.snapshots.copy import copy_tree
from services.containerd.snapshots.native import NativeSnapshotter
from services.containerd.snapshots.overlay import OverlaySnapshotter
from services.containerd.snapshots.recorded import SnapshotIds
from tests.fakes.snapshot_collaborators import RecordedEvents, RecordedLeases

if TYPE_CHECKING:
    from pathlib import Path

NS = "test"


def described(root: Path) -> dict[str, object]:
    """All that can be told of a tree, with links as groups of names."""
    groups: dict[int, list[str]] = {}
    found: dict[str, object] = {}
    for path in sorted([root, *root.rglob("*")]):
        status = path.lstat()
        name = str(path.relative_to(root))
        content: object = None
        if stat.S_ISREG(status.st_mode):
            content = path.read_bytes()
            groups.setdefault(status.st_ino, []).append(name)
        elif stat.S_ISLNK(status.st_mode):
            content = path.readlink()
        attributes = {
            key: os.getxattr(path, key, follow_symlinks=False)
            for key in os.listxattr(path, follow_symlinks=False)
        }
        found[name] = (
            status.st_mode,
            status.st_uid,
            status.st_gid,
            status.st_mtime_ns,
            status.st_rdev,
            status.st_size if content is not None else 0,
            attributes,
            content,
        )
    return {**found, "links": sorted(names for names in groups.values() if len(names) > 1)}


def test_a_copy_has_all_that_its_source_has(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "dir/below").mkdir(parents=True)
    (source / "file").write_bytes(os.urandom(200_000))
    (source / "empty").touch()
    (source / "dir/link").hardlink_to(source / "file")
    (source / "dir/below/third").hardlink_to(source / "file")
    (source / "symlink").symlink_to("/etc/../nowhere")
    (source / "dir/set").touch()
    (source / "dir/set").chmod(0o6711)
    (source / "dir/below").chmod(0o3555)
    os.mkfifo(source / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(source / "socket"))
    os.setxattr(source / "file", "user.name", b"value")
    os.setxattr(source / "dir", "user.of", b"directory")
    for number, path in enumerate([*source.rglob("*"), source]):
        os.utime(path, ns=(number * 10**9 + 1, number * 10**9 + 2), follow_symlinks=False)
    before = described(source)
    (tmp_path / "copy").mkdir()
    copy_tree(source, tmp_path / "copy")
    assert described(tmp_path / "copy") == before == described(source)


@pytest.mark.parametrize("size", [0, 1, 4096, 3 << 20])
def test_a_copy_has_the_holes_of_its_source(tmp_path: Path, size: int) -> None:
    for name in ("source", "copy"):
        (tmp_path / name).mkdir()
    with (tmp_path / "source/sparse").open("wb") as file:
        file.seek(5 << 20)
        file.write(b"x" * size)
        file.truncate(50 << 20)
    copy_tree(tmp_path / "source", tmp_path / "copy")
    original, copied = ((tmp_path / name / "sparse").stat() for name in ("source", "copy"))
    assert copied.st_size == original.st_size == 50 << 20
    assert copied.st_blocks <= original.st_blocks + 16
    assert (tmp_path / "copy/sparse").read_bytes() == (tmp_path / "source/sparse").read_bytes()


def test_a_tree_deeper_than_python_calls_itself(tmp_path: Path) -> None:
    below = "/".join(["d"] * 1010)
    subprocess.run(["mkdir", "-p", tmp_path / "source" / below, tmp_path / "copy"], check=True)
    (tmp_path / "source" / below / "file").write_text("deep")
    copy_tree(tmp_path / "source", tmp_path / "copy")
    assert (tmp_path / "copy" / below / "file").read_text() == "deep"
    # pytest would call itself as often
    subprocess.run(["rm", "-r", tmp_path / "source", tmp_path / "copy"], check=True)


async def test_a_child_changes_nothing_of_its_parent(tmp_path: Path) -> None:
    db = Database(tmp_path / "meta.db")
    db.open(MIGRATIONS)
    native = NativeSnapshotter(tmp_path, db, events=RecordedEvents(), leases=RecordedLeases())
    await native.open()
    (base,) = await native.prepare(NS, "1", "")
    (tmp_path / base.source / "file").write_text("one")
    await native.commit(NS, "one", "1")
    (work,) = await native.prepare(NS, "2", "one")
    assert (work.type, work.options) == ("bind", ("rw", "rbind"))
    (tmp_path / work.source / "file").write_text("two")
    await native.commit(NS, "two", "2")
    (look,) = await native.view(NS, "look", "one")
    assert (tmp_path / look.source / "file").read_text() == "one"
    assert look.options == ("ro", "rbind")
    db.close()


async def test_two_snapshotters_on_one_database_share_ids(tmp_path: Path) -> None:
    db = Database(tmp_path / "meta.db")
    db.open(MIGRATIONS)
    ids = SnapshotIds()
    both = [
        kind(tmp_path, db, events=RecordedEvents(), leases=RecordedLeases(), ids=ids)
        for kind in (OverlaySnapshotter, NativeSnapshotter)
    ]
    for snapshotter in both:
        await snapshotter.open()
    for number in range(3):
        for snapshotter in both:
            await snapshotter.prepare(NS, f"key {number}", "")
    for snapshotter in both:
        await snapshotter.cleanup()
        assert len(await snapshotter.infos(NS)) == 3
        assert len(list(snapshotter.root.iterdir())) == 3
    db.close()


async def test_a_copy_that_does_not_fit_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    db = Database(tmp_path / "meta.db")
    db.open(MIGRATIONS)
    native = NativeSnapshotter(tmp_path, db, events=RecordedEvents(), leases=RecordedLeases())
    await native.open()
    (base,) = await native.prepare(NS, "1", "")
    (tmp_path / base.source / "file").write_text("one")
    await native.commit(NS, "one", "1")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(copy, "_copy_data", full)
    monkeypatch.setattr(copy._Copy, "_clone", lambda *_: False)
    with pytest.raises(ResourceExhausted):
        await native.prepare(NS, "2", "one")
    assert [path.name for path in native.root.iterdir()] == ["1"]
    assert [info.name for info in await native.infos(NS)] == ["one"]
    db.close()
