"""Snapshots as the kernel shows them: mounted, unpacked into, compared."""

from __future__ import annotations

import os
import stat
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from services.common.database import Database
from services.common.errors import FailedPrecondition, InvalidArgument
from services.common.mounts import Mount, mount_all, temporary_mount, unmount_all
from services.common.overlay_mounts import MountFailed, overlay_option
from services.containerd.content.descriptor import Descriptor
from services.containerd.content.local import LocalContentStore
from services.containerd.diff.local_applier import LocalApplier
from services.containerd.diff.local_comparer import LocalComparer
from services.containerd.diff.media_types import OCI_GZIP, OCI_TAR
from services.containerd.diff.pool import WorkerPool
from services.containerd.gc.lock import GcLock
from services.containerd.metadata.schema import MIGRATIONS
from services.containerd.snapshots.idmap import GIDS_LABEL, UIDS_LABEL
from services.containerd.snapshots.native import NativeSnapshotter
from services.containerd.snapshots.overlay import OverlaySnapshotter
from services.containerd.snapshots.recorded import SnapshotIds
from tests.fakes.disk import small_disk
from tests.fakes.layers import Member, folder, hardlink, layer, looks, read
from tests.fakes.snapshot_collaborators import RecordedEvents, RecordedLeases
from tests.fakes.snapshotters import opened_database

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

pytestmark = pytest.mark.root

NS = "test"


@pytest.fixture(autouse=True)
def no_mount_is_left(tmp_path: Path) -> Iterator[None]:
    yield
    table = Path("/proc/self/mounts").read_text()
    left = [line.split()[1] for line in table.splitlines() if str(tmp_path) in line]
    for place in reversed(left):
        subprocess.run(["umount", "-l", place], check=False)
    assert left == []


@dataclass
class Node:
    root: Path
    db: Database
    ids: SnapshotIds
    overlay: OverlaySnapshotter
    content: LocalContentStore
    applier: LocalApplier
    comparer: LocalComparer

    async def blob(self, data: bytes, media_type: str = OCI_TAR) -> Descriptor:
        async with await self.content.writer(NS, f"ref-{len(data)}") as writer:
            await writer.write(data)
            info = await writer.commit()
        return Descriptor(media_type, info.digest, info.size_bytes)

    async def add(self, name: str, parent: str, *members: Member) -> Descriptor:
        """Unpack a layer into a committed snapshot."""
        descriptor = await self.blob(layer(members))
        mounts = await self.overlay.prepare(NS, f"extract {name}", parent)
        applied = await self.applier.apply(NS, descriptor, mounts)
        await self.overlay.commit(NS, name, f"extract {name}")
        return applied

    def seen(self, mounts: list[Mount]) -> dict[str, tuple[object, ...]]:
        with temporary_mount(mounts, self.root / "tmp", readonly=True) as place:
            return looks(place, times=False)


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    db = Database(tmp_path / "meta.db")
    db.open(MIGRATIONS)
    ids = SnapshotIds()
    overlay = OverlaySnapshotter(
        tmp_path, db, events=RecordedEvents(), leases=RecordedLeases(), ids=ids
    )
    await overlay.open()
    content = LocalContentStore(tmp_path, db, events=RecordedEvents(), gc_lock=GcLock())
    async with WorkerPool(1) as pool:
        yield Node(
            tmp_path,
            db,
            ids,
            overlay,
            content,
            LocalApplier(content, pool, tmp_path / "tmp"),
            LocalComparer(content, pool, tmp_path / "tmp"),
        )
    db.close()


async def test_changes_stay_in_their_snapshot(node: Node) -> None:
    overlay = node.overlay
    mounts = await overlay.prepare(NS, "1", "")
    with temporary_mount(mounts, node.root / "tmp") as place:
        (place / "base").write_text("one")
        (place / "dir").mkdir()
        (place / "dir/gone").touch()
    await overlay.commit(NS, "one", "1")
    mounts = await overlay.prepare(NS, "2", "one")
    with temporary_mount(mounts, node.root / "tmp") as place:
        (place / "base").write_text("two")
        (place / "dir/gone").unlink()
        (place / "new").touch()
    await overlay.commit(NS, "two", "2")
    for key, parent, base, names in (
        ("v1", "one", "one", ["base", "dir", "dir/gone"]),
        ("v2", "two", "two", ["base", "dir", "new"]),
    ):
        mounts = await overlay.view(NS, key, parent)
        with temporary_mount(mounts, node.root / "tmp") as place:
            assert (place / "base").read_text() == base
            assert sorted(str(p.relative_to(place)) for p in place.rglob("*")) == names
            with pytest.raises(OSError, match="Read-only"):
                (place / "x").touch()


async def test_more_layers_than_a_page_of_options_has_room_for(node: Node) -> None:
    parent = ""
    for number in range(120):
        (mount,) = await node.overlay.prepare(NS, "key", parent)
        upper = overlay_option(mount.options, "upperdir") or mount.source
        (Path(upper) / f"file{number}").touch()
        parent = f"layer {number}"
        await node.overlay.commit(NS, parent, "key")
    mounts = await node.overlay.prepare(NS, "work", parent)
    assert len(",".join(mounts[0].options)) > 2 * os.sysconf("SC_PAGE_SIZE")
    with temporary_mount(mounts, node.root / "tmp") as place:
        assert len(list(place.iterdir())) == 120
        (place / "written").touch()
    with temporary_mount(mounts, node.root / "tmp", readonly=True) as place:
        assert len(list(place.iterdir())) == 121


async def test_layers_are_seen_as_they_are_meant(node: Node) -> None:
    await node.add(
        "one",
        "",
        folder("etc", 0o750, uid=3),
        Member("etc/old", b"old"),
        Member("etc/kept", b"kept"),
        folder("var"),
        Member("var/a"),
        folder("srv"),
        Member("srv/x"),
        Member("replaced", b"file"),
    )
    await node.add(
        "two",
        "one",
        Member("etc/.wh.old"),
        Member("etc/new", b"new"),
        folder("var"),
        Member("var/.wh..wh..opq"),
        Member("var/b"),
        Member(".wh.srv"),
        folder("srv"),
        Member("srv/y"),
        folder("replaced"),
        Member("replaced/x"),
    )
    mounts = await node.overlay.view(NS, "look", "two")
    with temporary_mount(mounts, node.root / "tmp") as place:
        assert sorted(str(path.relative_to(place)) for path in place.rglob("*")) == [
            "etc",
            "etc/kept",
            "etc/new",
            "replaced",
            "replaced/x",
            "srv",
            "srv/y",
            "var",
            "var/b",
        ]
        status = (place / "etc").stat()
        assert (status.st_mode & 0o7777, status.st_uid) == (0o750, 3)


async def test_a_hard_link_to_a_file_of_a_lower_layer(node: Node) -> None:
    await node.add("one", "", folder("d", 0o711), Member("d/file", b"data", mode=0o4755, uid=9))
    await node.add(
        "two", "one", Member("first"), hardlink("d/link", "d/file"), hardlink("top", "/d/file")
    )
    mounts = await node.overlay.view(NS, "look", "two")
    with temporary_mount(mounts, node.root / "tmp") as place:
        for name in ("d/file", "d/link", "top"):
            status = (place / name).stat()
            assert (place / name).read_bytes() == b"data"
            assert (status.st_mode & 0o7777, status.st_uid, status.st_nlink) == (0o4755, 9, 3)
        assert (place / "d").stat().st_mode & 0o7777 == 0o711
    with pytest.raises(InvalidArgument, match="not below it"):
        await node.add("three", "two", hardlink("x", "nowhere"))


async def test_a_hard_link_to_what_the_layer_hides_is_refused(node: Node) -> None:
    await node.add("one", "", Member("file"))
    with pytest.raises(InvalidArgument, match="hard link"):
        await node.add("two", "one", Member(".wh.file"), hardlink("x", "file"))


async def test_a_user_namespace_sees_layers_as_its_own(node: Node) -> None:
    await node.add("one", "", Member("file", b"1"), folder("dir"))
    await node.add("two", "one", Member("dir/other", b"2"))
    labels = {UIDS_LABEL: "0:100000:65536", GIDS_LABEL: "0:200000:65536"}
    root = (100000, 200000)
    for key, parent in (("over one", "one"), ("over two", "two")):
        mounts = await node.overlay.prepare(NS, key, parent, labels)
        assert mounts == await node.overlay.mounts(NS, key)
        place = node.root / "place"
        place.mkdir(exist_ok=True)
        mount_all(mounts, place)
        try:
            found = [place, *place.rglob("*")]
            assert {(p.stat().st_uid, p.stat().st_gid) for p in found} == {root}
            # As the namespace's root, who is nobody special on the host.
            script = "echo more >> file && mkdir dir/made && rm -r dir/made && touch new"
            subprocess.run(
                f"setpriv --reuid=100000 --regid=200000 --clear-groups sh -c '{script}'",
                shell=True,
                cwd=place,
                check=True,
            )
            assert (place / "file").read_text() == "1more\n"
        finally:
            unmount_all(mounts, place)
    (look,) = await node.overlay.view(NS, "look", "one", labels)
    assert look.type == "bind"
    with temporary_mount([look], node.root / "tmp") as place:
        assert ((place / "file").stat().st_uid, (place / "file").read_text()) == (100000, "1")
        with pytest.raises(OSError, match="Read-only"):
            (place / "new").touch()


async def test_metacopy_and_redirects_of_the_machine_do_not_get_into_layers(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What they would leave in an upper directory makes no layer by itself."""
    parameters = node.root / "parameters"
    parameters.mkdir()
    for name in ("index", "metacopy", "redirect_dir"):
        (parameters / name).write_text("Y\n")
    monkeypatch.setattr("services.containerd.snapshots.overlay._PARAMETERS", parameters)
    await node.overlay.open()
    await node.add("base", "", Member("file", b"data"), folder("dir"), Member("dir/x"))
    mounts = await node.overlay.prepare(NS, "work", "base")
    assert {"index=off", "metacopy=off", "redirect_dir=off"} < set(mounts[0].options)
    with temporary_mount(mounts, node.root / "tmp") as place:
        (place / "file").chmod(0o600)
        subprocess.run(["mv", place / "dir", place / "moved"], check=True)
    upper = Path(overlay_option(mounts[0].options, "upperdir"))
    assert (upper / "file").read_bytes() == b"data"
    assert (upper / "moved/x").exists()
    for name in ("index", "metacopy", "redirect_dir"):
        (parameters / name).write_text("N\n")
    await node.overlay.open()
    assert (await node.overlay.mounts(NS, "work"))[0].options[-1] == "index=off"


async def test_a_native_snapshot_has_what_an_overlay_shows(node: Node) -> None:
    native = NativeSnapshotter(
        node.root, node.db, events=RecordedEvents(), leases=RecordedLeases(), ids=node.ids
    )
    await native.open()
    one = [folder("dir", mode=0o750), Member("dir/gone", b"1"), Member("kept", b"2")]
    two = [Member("dir/.wh.gone"), hardlink("dir/hard", "kept"), Member("new", b"3")]
    for name, parent, members in (("one", "", one), ("two", "one", two)):
        descriptor = await node.add(name, parent, *members)
        await node.applier.apply(
            NS, descriptor, await native.prepare(NS, f"extract {name}", parent)
        )
        await native.commit(NS, name, f"extract {name}")
    shown = node.seen(await node.overlay.view(NS, "look", "two"))
    assert node.seen(await native.view(NS, "look", "two")) == shown
    # A container's changes, made over the one, make the same of the other.
    mounts = await native.prepare(NS, "work", "two")
    with temporary_mount(mounts, node.root / "tmp") as place:
        (place / "kept").write_text("changed")
        (place / "new").unlink()
    made = await node.comparer.compare(NS, await native.view(NS, "below", "two"), mounts)
    copy = await node.overlay.prepare(NS, "copy", "two")
    await node.applier.apply(NS, made, copy)
    assert node.seen(copy) == node.seen(mounts)


async def test_a_native_snapshot_takes_no_room_where_blocks_can_be_shared(
    tmp_path: Path,
) -> None:
    with small_disk(tmp_path, "mkfs.btrfs", "-q", "-M", size_bytes=64 << 20) as place:
        async with opened_database(tmp_path / "meta.db") as db:
            native = NativeSnapshotter(place, db, events=RecordedEvents(), leases=RecordedLeases())
            await native.open()
            (base,) = await native.prepare(NS, "key", "")
            (Path(base.source) / "big").write_bytes(os.urandom(20 << 20))
            await native.commit(NS, "base", "key")
            for number in range(5):  # five times its size would not fit
                (work,) = await native.prepare(NS, f"work {number}", "base")
                assert (Path(work.source) / "big").stat().st_size == 20 << 20
            (Path(work.source) / "big").write_bytes(b"x")
            assert (Path(base.source) / "big").stat().st_size == 20 << 20


async def test_layers_can_be_unpacked_before_their_parents(node: Node) -> None:
    (mount,) = await node.overlay.prepare(NS, "key", "")
    free = Mount("overlay", "overlay", options=("rw", f"upperdir={mount.source}"))
    descriptor = await node.blob(layer([Member(".wh.old"), Member("new")]))
    await node.applier.apply(NS, descriptor, [free])
    await node.add("base", "", Member("old"))
    await node.overlay.commit(NS, "top", "key", parent="base")
    mounts = await node.overlay.view(NS, "look", "top")
    with temporary_mount(mounts, node.root / "tmp") as place:
        assert [path.name for path in place.iterdir()] == ["new"]


async def test_mounts_that_are_not_plain_are_mounted_by_the_worker(node: Node) -> None:
    source, inner = node.root / "source", node.root / "inner"
    source.mkdir()
    (source / "sub").mkdir()
    inner.mkdir()
    mounts = [
        Mount("bind", str(source), options=("rw", "rbind")),
        Mount("bind", str(inner), "/sub", ("rw", "rbind")),
    ]
    await node.applier.apply(NS, await node.blob(layer([Member("sub/file", b"x")])), mounts)
    assert (inner / "file").read_bytes() == b"x"
    assert list((source / "sub").iterdir()) == []


async def test_a_layer_made_of_a_snapshot_makes_that_snapshot(node: Node) -> None:
    await node.add(
        "base",
        "",
        folder("d"),
        *(Member(f"d/{name}", name.encode()) for name in ("changed", "gone", "kept")),
        folder("emptied"),
        Member("emptied/x"),
        folder("moved"),
        Member("moved/inside"),
    )
    mounts = await node.overlay.prepare(NS, "work", "base")
    with temporary_mount(mounts, node.root / "tmp") as place:
        (place / "d/changed").write_text("more")
        (place / "d/gone").unlink()
        (place / "d/hard").hardlink_to(place / "d/changed")
        os.setxattr(place / "d/kept", "user.x", b"y")
        (place / "emptied/x").unlink()
        (place / "emptied").rmdir()
        (place / "emptied").mkdir()
        subprocess.run(["mv", place / "moved", place / "elsewhere"], check=True)
        (place / "soft").symlink_to("/etc")
        os.mknod(place / "device", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    below = await node.overlay.view(NS, "below", "base")
    made = await node.comparer.compare(NS, below, mounts, labels={"a": "b"})
    info = await node.content.info(NS, made.digest)
    assert (made.media_type, made.size_bytes) == (OCI_GZIP, info.size_bytes)
    assert info.labels["a"] == "b"
    names = [entry.name for entry in read(await node.content.read(NS, made.digest))]
    assert "d/kept" in names
    assert "d/.wh.gone" in names
    copy = await node.overlay.prepare(NS, "copy", "base")
    applied = await node.applier.apply(NS, made, copy)
    assert applied.digest == info.labels["containerd.io/uncompressed"]
    assert node.seen(copy) == node.seen(mounts)
    again = await node.comparer.compare(NS, below, mounts, ref="mine", labels={"c": "d"})
    assert again == made
    labels = (await node.content.info(NS, made.digest)).labels
    assert (labels["a"], labels["c"]) == ("b", "d")
    assert list((node.root / "tmp").iterdir()) in ([], [node.root / "tmp/empty"])


class TestMounts:
    def test_all_or_none(self, tmp_path: Path) -> None:
        for name in ("a", "target"):
            (tmp_path / name).mkdir()
        mounts = [Mount("bind", str(tmp_path / "a")), Mount("bind", str(tmp_path / "nowhere"))]
        with pytest.raises(FailedPrecondition, match="nowhere"):
            mount_all(mounts, tmp_path / "target")

    def test_undone_in_reverse_and_twice_without_harm(self, tmp_path: Path) -> None:
        for name in ("a/sub", "b", "target"):
            (tmp_path / name).mkdir(parents=True)
        (tmp_path / "b/file").touch()
        mounts = [
            Mount("bind", str(tmp_path / "a"), options=("rbind",)),
            Mount("bind", str(tmp_path / "b"), "sub", ("rbind", "ro")),
        ]
        mount_all(mounts, tmp_path / "target")
        assert (tmp_path / "target/sub/file").exists()
        with pytest.raises(OSError, match="Read-only"):
            (tmp_path / "target/sub/new").touch()
        unmount_all(mounts, tmp_path / "target")
        assert list((tmp_path / "target").iterdir()) == []
        unmount_all([mounts[0]], tmp_path / "target")

    def test_a_target_does_not_leave_the_root(self, tmp_path: Path) -> None:
        for name in ("a/inside", "outside", "root"):
            (tmp_path / name).mkdir(parents=True)
        (tmp_path / "a/link").symlink_to("/inside")
        (tmp_path / "a/out").symlink_to(tmp_path / "outside")
        root = Mount("bind", str(tmp_path / "a"), options=("rbind",))
        mounts = [root, Mount("tmpfs", "tmpfs", "../link", ("size=64k",))]
        mount_all(mounts, tmp_path / "root")
        assert os.path.ismount(tmp_path / "root/inside")
        unmount_all(mounts, tmp_path / "root")
        with pytest.raises(FailedPrecondition, match="out"):
            mount_all([root, Mount("tmpfs", "tmpfs", "out")], tmp_path / "root")

    def test_what_is_in_use_stays(self, tmp_path: Path) -> None:
        (tmp_path / "target").mkdir()
        mounts = [Mount("tmpfs", "tmpfs", options=("size=64k", "nosuid"))]
        mount_all(mounts, tmp_path / "target")
        with (
            (tmp_path / "target/file").open("w"),
            pytest.raises(FailedPrecondition, match="in use"),
        ):
            unmount_all(mounts, tmp_path / "target")
        unmount_all(mounts, tmp_path / "target")

    def test_the_kernels_reason_is_told(self, tmp_path: Path) -> None:
        for name in ("a", "b", "target"):
            (tmp_path / name).mkdir()
        options = (f"lowerdir={tmp_path}/a:{tmp_path}/b", "nonsense=1")
        with pytest.raises(MountFailed, match="nonsense"):
            mount_all([Mount("overlay", "overlay", options=options)], tmp_path / "target")
        with pytest.raises(MountFailed, match="No such device"):
            mount_all([Mount("nosuchfs", "none")], tmp_path / "target")
