"""The check of a root: what it finds of each kind of damage, and how it is repaired."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import sqlite3
from typing import TYPE_CHECKING

import pytest

from services.common.root_lock import RootLock
from services.containerd.check import program
from services.containerd.check.findings import Finding, Kind, Severity
from services.containerd.check.unclean import run_noted
from services.containerd.content.digest import chain_ids
from tests.fakes.images import Blobs, BuiltImage, build_image
from tests.fakes.registry import FakeRegistry
from tests.fakes.snapshotters import opened_database
from tests.fakes.storage_node import NS, open_checker, open_storage

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path


NOISE = random.Random(7).randbytes(20_000)


class Root:
    """A root with one image, unpacked into both snapshotters, and a container."""

    def __init__(self, path: Path, registry: FakeRegistry) -> None:
        self.path = path
        self.registry = registry
        self.blobs = Blobs()
        self.image: BuiltImage = build_image(
            self.blobs,
            [{"bin/sh": NOISE, "etc/motd": b"hello"}, {"etc/motd": b"changed", "new": b""}],
        )
        self.name = registry.serve("library/x", "1", self.image.manifest, self.blobs)
        self.chain = chain_ids(self.image.diff_ids)

    async def fill(self) -> None:
        async with open_storage(self.path) as node:
            for snapshotter in ("overlayfs", "native"):
                await node.pull(self.name, snapshotter)
            await node.run("box", self.chain[-1])

    def blob(self, digest: str) -> Path:
        return self.path / "content/blobs/sha256" / digest.removeprefix("sha256:")

    async def files(self, name: str, snapshotter: str = "overlayfs") -> Path:
        def identity(db: sqlite3.Connection) -> int:
            row = db.execute(
                "SELECT id FROM snapshots WHERE snapshotter = ? AND key = ?", (snapshotter, name)
            ).fetchone()
            return int(row[0])

        db = sqlite3.connect(self.path / "meta.db")
        try:
            return self.path / "snapshots" / snapshotter / str(identity(db)) / "fs"
        finally:
            db.close()

    async def check(self, *, repair: bool = False) -> list[Finding]:
        async with open_checker(self.path) as made:
            return await made.full(repair=repair)

    async def quick(self) -> list[Finding]:
        async with open_checker(self.path) as made:
            return await made.quick()


@pytest.fixture
async def root(tmp_path: Path) -> AsyncIterator[Root]:
    async with FakeRegistry() as registry:
        root = Root(tmp_path / "root", registry)
        await root.fill()
        yield root


def told(findings: list[Finding]) -> set[tuple[Kind, str]]:
    assert all(f.severity == Severity.DAMAGE for f in findings), findings
    return {(finding.kind, finding.name) for finding in findings}


async def test_nothing_is_found_where_nothing_is_wrong(root: Root) -> None:
    assert await root.check() == []
    assert await root.check(repair=True) == []
    async with open_storage(root.path) as node:
        assert len(await node.snapshotters["overlayfs"].infos(NS)) == 3


@pytest.mark.parametrize("which", ["manifest", "config", "layer"])
@pytest.mark.parametrize("how", ["missing", "cut", "changed"])
async def test_a_damaged_blob_is_fetched_again(root: Root, which: str, how: str) -> None:
    parts = {"manifest": root.image.manifest, "config": root.image.config}
    digest = parts.get(which, root.image.layers[0]).digest
    file = root.blob(digest)
    good = file.read_bytes()
    damage(file, how)
    assert told(await root.check()) == {(Kind.BLOB, digest)}
    assert told(await root.quick()) == ({(Kind.BLOB, digest)} if how != "changed" else set())
    [finding] = await root.check(repair=True)
    assert finding.repaired and "fetched again from 127.0.0.1" in finding.remedy
    assert file.read_bytes() == good
    assert file.stat().st_mode & 0o777 == 0o444
    assert await root.check() == []


def damage(file: Path, how: str) -> None:
    if how == "missing":
        file.unlink()
        return
    data = file.read_bytes()
    file.chmod(0o600)
    file.write_bytes(data[:-1] if how == "cut" else data[:-1] + bytes([data[-1] ^ 1]))


async def test_all_blobs_at_once(root: Root) -> None:
    """The manifest has to be there again before anybody knows what the others are."""
    for digest in root.blobs.data:
        root.blob(digest).unlink()
    findings = await root.check(repair=True)
    assert len(findings) == len(root.blobs.data)
    assert all(finding.repaired for finding in findings)
    assert await root.check() == []


async def test_a_blob_that_nobody_has_is_dropped_so_that_a_pull_brings_it(root: Root) -> None:
    digest = root.image.layers[0].digest
    root.blob(digest).chmod(0o600)
    root.blob(digest).write_bytes(b"x")
    kept = root.registry.blobs.pop(digest)
    [finding] = await root.check(repair=True)
    assert finding.remains and "dropped, pull it again" in finding.remedy
    assert not root.blob(digest).exists()
    assert await root.check() == []
    root.registry.blobs[digest] = kept
    async with open_storage(root.path) as node:
        await node.pull(root.name)
    assert root.blob(digest).exists()


async def test_a_registry_that_sends_wrong_bytes_repairs_nothing(root: Root) -> None:
    digest = root.image.layers[0].digest
    root.blob(digest).unlink()
    root.registry.blobs[digest] = bytes(len(root.registry.blobs[digest]))
    [finding] = await root.check(repair=True)
    assert finding.remains and "wrong bytes" in finding.remedy
    assert list((root.path / "content/ingest").iterdir()) == []


def remove(files: Path) -> None:
    shutil.rmtree(files.parent)


def remove_a_file(files: Path) -> None:
    (files / "etc/motd").unlink()


def change_a_file(files: Path) -> None:
    file = files / "etc/motd"
    status = file.stat()
    file.write_bytes(b"X" * status.st_size)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def change_a_mode(files: Path) -> None:
    (files / "etc/motd").chmod(0o4755)


def add_a_file(files: Path) -> None:
    (files / "etc/added").touch()


@pytest.mark.parametrize("snapshotter", ["overlayfs", "native"])
@pytest.mark.parametrize("how", [remove, remove_a_file, change_a_file, change_a_mode, add_a_file])
async def test_a_damaged_layer_is_unpacked_anew(
    root: Root, snapshotter: str, how: Callable[[Path], None]
) -> None:
    name = f"{snapshotter}/{NS}/{root.chain[0]}"
    files = await root.files(root.chain[0], snapshotter)
    how(files)
    assert told(await root.check()) == {(Kind.COMMITTED, name)}
    assert told(await root.quick()) == ({(Kind.COMMITTED, name)} if how is remove else set())
    [finding] = await root.check(repair=True)
    assert finding.repaired and root.image.layers[0].digest in finding.remedy
    assert (files / "etc/motd").read_bytes() == b"hello"
    assert await root.check() == []
    async with open_storage(root.path) as node:
        infos = await node.snapshotters[snapshotter].infos(NS)
        assert not [info.name for info in infos if info.name.startswith("check-")]
        names = {path.name for path in node.snapshotters[snapshotter].root.iterdir()}
        assert len(names) == len(infos)


async def test_a_whole_chain_and_its_blobs(root: Root) -> None:
    for name in root.chain:
        shutil.rmtree((await root.files(name)).parent)
    for layer in root.image.layers:
        root.blob(layer.digest).unlink()
    findings = await root.check(repair=True)
    assert len(findings) == 4 and all(finding.repaired for finding in findings)
    assert await root.check() == []
    assert (await root.files(root.chain[1]) / "etc/motd").read_bytes() == b"changed"


async def test_a_layer_without_a_blob_stays_damaged(root: Root) -> None:
    digest = root.image.layers[1].digest
    root.blob(digest).unlink()
    del root.registry.blobs[digest]
    shutil.rmtree((await root.files(root.chain[1])).parent)
    blob, snapshot = await root.check(repair=True)
    assert (blob.kind, snapshot.kind) == (Kind.BLOB, Kind.COMMITTED)
    assert blob.remains and snapshot.remains


async def test_an_active_snapshot_without_files_is_empty_then(root: Root) -> None:
    files = await root.files("box")
    shutil.rmtree(files.parent)
    assert told(await root.check()) == {(Kind.ACTIVE, f"overlayfs/{NS}/box")}
    [finding] = await root.check(repair=True)
    assert finding.remedy == "made anew, empty"
    assert files.is_dir()


async def test_leftovers_are_told_and_removed(root: Root) -> None:
    stray = root.blob("sha256:" + "0" * 64)
    stray.write_bytes(b"x")
    (root.path / "content/ingest/abc").mkdir()
    (root.path / "snapshots/overlayfs/999/fs").mkdir(parents=True)
    (root.path / "snapshots/native/rm-1-x").mkdir()
    findings = await root.check()
    assert {finding.severity for finding in findings} == {Severity.LEFTOVER}
    assert {finding.kind for finding in findings} == {Kind.BLOB, Kind.INGEST, Kind.DIRECTORY}
    assert len(findings) == 4
    assert not any(finding.remains for finding in findings)
    assert stray.exists()
    assert all(finding.repaired for finding in await root.check(repair=True))
    assert await root.check() == []


@pytest.fixture(autouse=True)
def logs_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program.log, "configure", lambda *_: None)


def run(*arguments: str) -> int:
    return program.main(list(arguments))


async def test_the_program_tells_in_lines_and_by_its_exit_code(
    root: Root, capsys: pytest.CaptureFixture[str]
) -> None:
    async def ran(*arguments: str) -> tuple[int, list[str]]:
        code = await asyncio.to_thread(run, "--root", str(root.path), *arguments)
        return code, capsys.readouterr().out.splitlines()

    assert await ran() == (0, ["0 findings, 0 left"])
    digest = root.image.layers[0].digest
    root.blob(digest).unlink()
    line = f"damage: blob {digest}: its file is missing"
    assert await ran("--quick") == (1, [line, "1 findings, 1 left"])
    code, lines = await ran("--repair")
    assert (code, lines[-1]) == (0, "1 findings, 0 left")
    assert lines[0].startswith(f"{line} (fetched again from")


async def test_a_root_in_use_is_not_checked(root: Root, capsys: pytest.CaptureFixture[str]) -> None:
    async with RootLock(root.path).held(0):
        assert await asyncio.to_thread(run, "--root", str(root.path)) == 2
    assert "belongs to process" in capsys.readouterr().err


def test_no_root_and_no_database(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--root", str(tmp_path / "nowhere")) == 2
    assert not (tmp_path / "nowhere").exists()
    assert "there is no containerd's root" in capsys.readouterr().err
    (tmp_path / "meta.db").write_bytes(b"not a database" * 1000)
    assert run("--root", str(tmp_path)) == 2
    assert "not a database" in capsys.readouterr().err


async def test_a_row_that_refers_to_nothing_is_found(root: Root) -> None:
    db = sqlite3.connect(root.path / "meta.db")
    db.execute("UPDATE snapshots SET parent_id = 12345 WHERE key = 'box'")
    db.commit()
    db.close()
    [finding] = [f for f in await root.quick() if f.kind == Kind.DATABASE]
    assert "snapshots" in finding.text and finding.remains


async def test_a_start_after_an_unclean_stop_looks_for_itself(root: Root) -> None:
    digest = root.image.layers[0].digest
    names = ("overlayfs", "native")
    damage(root.blob(digest), "cut")
    async with opened_database(root.path / "meta.db") as db:
        async with run_noted(db, root.path, names) as found:
            assert found == []  # what was before ended well, or was never
        async with run_noted(db, root.path, names) as found:
            assert found == []
        with pytest.raises(RuntimeError):
            async with run_noted(db, root.path, names):
                raise RuntimeError
        async with run_noted(db, root.path, names) as found:
            assert told(found) == {(Kind.BLOB, digest)}
        async with run_noted(db, root.path, names) as found:
            assert found == []
