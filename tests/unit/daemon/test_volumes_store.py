from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

import pytest

from services.common.database import Database
from services.common.errors import FailedPrecondition, Internal, InvalidArgument, NotFound
from services.daemon.metadata import volumes as rows
from services.daemon.metadata.volumes import VOLUMES_DDL
from services.daemon.volumes import copy_up
from services.daemon.volumes.mounts import Mount, MountType
from services.daemon.volumes.store import ANONYMOUS_LABEL, VolumeStore

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Database]:
    database = Database(tmp_path / "daemon.db")
    database.open([VOLUMES_DDL])
    yield database
    database.close()


@pytest.fixture
def store(db: Database, tmp_path: Path) -> VolumeStore:
    return VolumeStore(db, tmp_path / "volumes")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    root = tmp_path / "image"
    (root / "data/sub").mkdir(parents=True)
    (root / "data").chmod(0o750)
    (root / "data/file").write_text("content")
    os.link(root / "data/file", root / "data/same")
    (root / "data/link").symlink_to("/etc/passwd")
    (root / "alias").symlink_to("/data")
    (root / "out").symlink_to("../../../../../../data")
    return root


def nobody(_tx, _name) -> list[str]:
    return []


async def test_a_volume_is_a_directory_with_a_row(store: VolumeStore, tmp_path: Path) -> None:
    volume = await store.create("data.1", labels={"a": "b"})
    assert volume.mountpoint == tmp_path / "volumes/data.1/_data"
    assert volume.mountpoint.is_dir()
    assert (volume.driver, volume.labels, volume.anonymous) == ("local", {"a": "b"}, False)
    assert await store.get("data.1") == volume
    assert await store.list_all() == [volume]


async def test_creating_again_returns_what_is_there(store: VolumeStore) -> None:
    first = await store.create("data", labels={"a": "b"})
    (first.mountpoint / "x").write_text("kept")
    again = await store.create("data", labels={"c": "d"}, driver="local")
    assert again == first
    assert (again.mountpoint / "x").read_text() == "kept"


async def test_many_creators_of_one_name_get_the_same_volume(store: VolumeStore) -> None:
    made = await asyncio.gather(*(store.create("data") for _ in range(5)))
    assert len({volume.created_at_ns for volume in made}) == 1


async def test_an_anonymous_volume_has_a_random_name_and_a_label(store: VolumeStore) -> None:
    one, two = await store.create(), await store.create()
    assert one.name != two.name
    assert len(one.name) == 64
    assert one.anonymous
    assert one.labels == {ANONYMOUS_LABEL: ""}


@pytest.mark.parametrize("name", ["a", "../x", "a/b", ".hidden", "-x", "a b", "x" * 256, "ä1"])
async def test_bad_names_are_refused(store: VolumeStore, name: str) -> None:
    with pytest.raises(InvalidArgument, match=r"too short|includes invalid characters"):
        await store.create(name)


async def test_other_drivers_are_not_there(store: VolumeStore) -> None:
    with pytest.raises(NotFound, match='plugin "nfs" not found'):
        await store.create("data", driver="nfs")


async def test_removing_takes_row_and_content(store: VolumeStore, tmp_path: Path) -> None:
    volume = await store.create("data")
    (volume.mountpoint / "x").write_text("gone")
    await store.remove("data", users=nobody)
    assert list((tmp_path / "volumes").iterdir()) == []
    with pytest.raises(NotFound, match="get data: no such volume"):
        await store.get("data")
    with pytest.raises(NotFound, match="remove data: no such volume"):
        await store.remove("data", users=nobody)
    await store.remove("data", users=nobody, force=True)


async def test_a_volume_in_use_stays(store: VolumeStore) -> None:
    volume = await store.create("data")

    def users(tx, name) -> list[str]:
        assert rows.get(tx, name) is not None
        return ["c1", "c2"]

    with pytest.raises(FailedPrecondition) as refused:
        await store.remove("data", users=users, force=True)
    assert refused.value.message == "remove data: volume is in use - [c1, c2]"
    assert volume.mountpoint.is_dir()


async def test_an_empty_volume_is_filled_from_the_image(store: VolumeStore, image: Path) -> None:
    volume = await store.create("data")
    await store.copy_up("data", root=image, path="/data")
    data = volume.mountpoint
    assert (data / "file").read_text() == "content"
    assert (data / "file").stat().st_ino == (data / "same").stat().st_ino
    assert (data / "link").readlink().as_posix() == "/etc/passwd"
    assert (data / "sub").is_dir()
    assert data.stat().st_mode & 0o777 == 0o750


@pytest.mark.parametrize("path", ["/alias", "/out", "data/../data"])
async def test_the_image_path_is_resolved_inside_the_image(
    store: VolumeStore, image: Path, path: str
) -> None:
    volume = await store.create("data")
    await store.copy_up("data", root=image, path=path)
    assert (volume.mountpoint / "file").exists()


@pytest.mark.parametrize("path", ["/none", "/data/file", "/data/link"])
async def test_without_a_directory_in_the_image_the_volume_stays_empty(
    store: VolumeStore, image: Path, path: str
) -> None:
    volume = await store.create("data")
    await store.copy_up("data", root=image, path=path)
    assert list(volume.mountpoint.iterdir()) == []


async def test_a_volume_with_content_is_left_alone(store: VolumeStore, image: Path) -> None:
    volume = await store.create("data")
    (volume.mountpoint / "mine").write_text("kept")
    await store.copy_up("data", root=image, path="/data")
    assert [path.name for path in volume.mountpoint.iterdir()] == ["mine"]
    with pytest.raises(NotFound):
        await store.copy_up("none", root=image, path="/data")


async def test_a_copy_that_was_interrupted_is_begun_anew(
    store: VolumeStore, db: Database, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume = await store.create("data")
    cp = tmp_path / "bin/cp"
    cp.parent.mkdir()
    cp.write_text('#!/bin/sh\nmkdir "$5/half"; touch "$5/half/file"; echo full >&2; exit 1\n')
    cp.chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", f"{cp.parent}:{os.environ['PATH']}")
        with pytest.raises(Internal, match="failed: full"):
            await store.copy_up("data", root=image, path="/data")
    assert (volume.mountpoint / "half/file").exists()
    await VolumeStore(db, volume.mountpoint.parents[1]).copy_up("data", root=image, path="/data")
    assert sorted(path.name for path in volume.mountpoint.iterdir()) == [
        "file",
        "link",
        "same",
        "sub",
    ]


def test_a_copy_that_fails_says_why(image: Path, tmp_path: Path) -> None:
    with pytest.raises(Internal, match=r"copying image content into .*/none/such failed: .*cp: "):
        copy_up.copy_tree(image, "/data", tmp_path / "none/such")


async def test_restore_brings_directories_in_line_with_rows(
    store: VolumeStore, tmp_path: Path
) -> None:
    await store.restore()
    kept, lost = await store.create("kept"), await store.create("lost")
    (kept.mountpoint / "x").write_text("kept")
    lost.mountpoint.rmdir()
    (tmp_path / "volumes/.removed-1/_data").mkdir(parents=True)
    (tmp_path / "volumes/unknown/_data").mkdir(parents=True)
    await store.restore()
    assert sorted(path.name for path in (tmp_path / "volumes").iterdir()) == ["kept", "lost"]
    assert (kept.mountpoint / "x").exists()
    assert lost.mountpoint.is_dir()


async def test_mounts_are_resolved_with_what_they_need(store: VolumeStore, tmp_path: Path) -> None:
    named = await store.resolve(Mount(MountType.VOLUME, "data", "/d", options=("nocopy",)))
    assert (named.volume, named.source) == ("data", str(tmp_path / "volumes/data/_data"))
    assert not named.copy_up
    anonymous = await store.resolve(Mount(MountType.VOLUME, "", "/d"))
    assert (await store.get(anonymous.volume)).anonymous
    assert anonymous.copy_up
    bind = await store.resolve(Mount(MountType.BIND, str(tmp_path), "/b"))
    assert (bind.source, bind.volume) == (str(tmp_path), "")
    tmpfs = await store.resolve(Mount(MountType.TMPFS, "", "/t"))
    assert not tmpfs.is_bind
    with pytest.raises(InvalidArgument):
        await store.resolve(Mount(MountType.VOLUME, "../x", "/d"))
