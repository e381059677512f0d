"""The local content store: writes, commits, labels, sharing, and what crashes leave behind."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from services.common.database import Database
from services.common.disk import DiskFloor
from services.common.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    OutOfRange,
    ResourceExhausted,
    Unavailable,
)
from services.containerd.content.digest import chain_ids, digest_of, split_digest
from services.containerd.content.local import LocalContentStore
from services.containerd.gc.lock import GcLock
from services.containerd.leases.lease import current_lease
from services.containerd.metadata import leases
from services.containerd.metadata.schema import MIGRATIONS
from tests.fakes.metadata import open_metadata

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import AsyncIterator, Callable, Mapping
    from pathlib import Path

DATA = b"some bytes, " * 1000
DIGEST = digest_of(DATA)


@dataclass
class Events:
    """Keeps what was journaled."""

    seen: list[tuple[str, str, dict[str, object]]] = field(default_factory=list)

    def append(
        self,
        tx: sqlite3.Connection,
        namespace: str,
        topic: str,
        type_name: str,
        fields: Mapping[str, object],
    ) -> None:
        assert tx.in_transaction
        self.seen.append((namespace, topic, dict(fields)))


@dataclass
class Node:
    root: Path
    store: LocalContentStore
    db: Database
    events: Events

    def files(self) -> list[str]:
        content = self.root / "content"
        return sorted(str(p.relative_to(content)) for p in content.rglob("*") if p.is_file())


@asynccontextmanager
async def opened(
    root: Path, *, trace: Callable[[str], None] = lambda _: None
) -> AsyncIterator[Node]:
    db = Database(root / "meta.db")
    db.open(MIGRATIONS)
    events = Events()
    store = LocalContentStore(root, db, events=events, gc_lock=GcLock(), trace=trace)
    try:
        yield Node(root, store, db, events)
    finally:
        await asyncio.to_thread(db.close)


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    async with opened(tmp_path) as node:
        yield node


async def put(node: Node, data: bytes = DATA, *, namespace: str = "a", **commit: Any) -> str:
    async with await node.store.writer(namespace, f"put-{digest_of(data)}") as writer:
        await writer.write(data)
        return (await writer.commit(**commit)).digest


def blob_name(digest: str) -> str:
    return "blobs/" + "/".join(split_digest(digest))


async def test_commit_makes_a_blob_that_reads_back(node: Node) -> None:
    async with await node.store.writer("a", "ref", total_bytes=len(DATA)) as writer:
        await writer.write(DATA[:100])
        await writer.write(DATA[100:])
        assert writer.offset_bytes == len(DATA)
        info = await writer.commit(expected=DIGEST, labels={"k": "v"}, media_type="text/x")
    assert (info.digest, info.size_bytes, info.labels) == (DIGEST, len(DATA), {"k": "v"})
    assert await node.store.info("a", DIGEST) == info
    assert await node.store.read("a", DIGEST) == DATA
    assert node.files() == [blob_name(DIGEST)]
    assert (await node.store.path("a", DIGEST)).stat().st_mode & 0o777 == 0o444
    assert node.events.seen == [
        ("a", "/content/create", {"digest": DIGEST, "size": len(DATA), "mediaType": "text/x"})
    ]
    assert await node.store.statuses("a") == []


async def test_sha512_is_computed_when_expected_from_the_start_or_only_at_commit(
    node: Node,
) -> None:
    expected = digest_of(DATA, "sha512")
    async with await node.store.writer("a", "early", expected=expected) as writer:
        await writer.write(DATA)
        assert writer.digest == expected
        assert (await writer.commit()).digest == expected
    other = b"other"
    async with await node.store.writer("a", "late") as writer:
        await writer.write(other)
        info = await writer.commit(expected=digest_of(other, "sha512"))
    assert info.digest == digest_of(other, "sha512")
    assert await node.store.read("a", info.digest) == other


async def test_commit_rejects_wrong_digest_and_wrong_size_and_keeps_the_ingest(node: Node) -> None:
    for wrong in ({"expected": digest_of(b"x")}, {"size_bytes": 5}):
        writer = await node.store.writer("a", "ref")
        if not writer.offset_bytes:
            await writer.write(DATA)
        with pytest.raises(FailedPrecondition, match="unexpected commit"):
            await writer.commit(**wrong)
        with pytest.raises(FailedPrecondition, match="closed"):
            await writer.write(b"more")
    assert (await node.store.status("a", "ref")).offset_bytes == len(DATA)
    assert not any(name.startswith("blobs") for name in node.files())


async def test_ref_is_locked_by_one_writer_until_it_is_closed(node: Node) -> None:
    writer = await node.store.writer("a", "ref")
    with pytest.raises(Unavailable, match="locked"):
        await node.store.writer("a", "ref")
    async with await node.store.writer("b", "ref"):
        pass
    await writer.close()
    async with await node.store.writer("a", "ref"):
        pass


async def test_commit_of_a_present_digest_says_already_exists_and_drops_the_ingest(
    node: Node,
) -> None:
    await put(node)
    with pytest.raises(AlreadyExists):
        async with await node.store.writer("a", "again") as writer:
            await writer.write(DATA)
            await writer.commit()
    with pytest.raises(AlreadyExists):
        await node.store.writer("a", "third", expected=DIGEST)
    assert await node.store.statuses("a") == []
    assert node.files() == [blob_name(DIGEST)]


async def test_two_commits_of_one_digest_at_once_make_one_blob(node: Node) -> None:
    writers = [await node.store.writer("a", ref) for ref in ("one", "two")]
    for writer in writers:
        await writer.write(DATA)
    results = await asyncio.gather(*(w.commit() for w in writers), return_exceptions=True)
    assert sorted(type(result).__name__ for result in results) == ["AlreadyExists", "ContentInfo"]
    assert node.files() == [blob_name(DIGEST)]


async def test_another_namespace_takes_a_blob_over_without_writing_it(node: Node) -> None:
    await put(node, labels={"mine": "1"})
    with pytest.raises(NotFound):
        await node.store.info("b", DIGEST)
    async with await node.store.writer("b", "ref", expected=DIGEST) as writer:
        assert writer.offset_bytes == len(DATA)
        assert writer.digest == DIGEST
        info = await writer.commit(labels={"theirs": "1"})
    assert info.labels == {"theirs": "1"}
    await node.store.delete("a", DIGEST)
    assert await node.store.read("b", DIGEST) == DATA
    await node.store.delete("b", DIGEST)
    assert node.files() == []


async def test_a_blob_being_taken_over_outlives_its_last_namespace(node: Node) -> None:
    await put(node)
    async with await node.store.writer("b", "ref", expected=DIGEST) as writer:
        await node.store.delete("a", DIGEST)
        await writer.commit()
    assert await node.store.read("b", DIGEST) == DATA
    await node.store.delete("b", DIGEST)
    await put(node)
    async with await node.store.writer("b", "ref", expected=DIGEST):
        await node.store.delete("a", DIGEST)
    await node.store.abort("b", "ref")
    assert node.files() == []


async def test_a_shared_blob_can_be_written_anew_after_truncate(node: Node) -> None:
    await put(node)
    async with await node.store.writer("b", "ref", expected=DIGEST) as writer:
        with pytest.raises(FailedPrecondition, match="complete"):
            await writer.write(b"more")
        await writer.truncate()
        assert writer.offset_bytes == 0
        await writer.write(DATA)
        await writer.commit()
    assert await node.store.read("b", DIGEST) == DATA


async def test_truncate_begins_again(node: Node) -> None:
    async with await node.store.writer("a", "ref") as writer:
        await writer.write(b"wrong")
        await writer.truncate()
        await writer.write(DATA)
        assert (await writer.commit()).digest == DIGEST


async def test_abort_takes_the_ingest_from_under_its_writer(node: Node) -> None:
    writer = await node.store.writer("a", "ref")
    await writer.write(DATA)
    await node.store.abort("a", "ref")
    with pytest.raises(FailedPrecondition, match="aborted"):
        await writer.write(DATA)
    assert node.files() == []
    with pytest.raises(NotFound):
        await node.store.abort("a", "ref")
    with pytest.raises(NotFound):
        await node.store.status("a", "ref")


async def test_ingest_goes_on_after_a_restart(tmp_path: Path) -> None:
    async with opened(tmp_path) as node:
        writer = await node.store.writer("a", "ref", total_bytes=len(DATA), expected=DIGEST)
        await writer.write(DATA[:500])
        await writer.close()
    async with opened(tmp_path) as node:
        assert not await node.store.reconcile()
        status = await node.store.status("a", "ref")
        assert (status.offset_bytes, status.total_bytes, status.expected) == (
            500,
            len(DATA),
            DIGEST,
        )
        async with await node.store.writer("a", "ref") as writer:
            assert writer.offset_bytes == 500
            await writer.write(DATA[500:])
            assert (await writer.commit()).digest == DIGEST


@dataclass
class Photograph:
    """Copies the root at one named step: what a machine that stopped there would find."""

    root: Path
    copy: Path
    step: str

    def __call__(self, step: str) -> None:
        if step == self.step and not self.copy.exists():
            shutil.copytree(self.root, self.copy)


async def crash(tmp_path: Path, step: str, act: Callable[[Node], Any]) -> Path:
    root, copy = tmp_path / "root", tmp_path / "copy"
    root.mkdir()
    async with opened(root, trace=Photograph(root, copy, step)) as node:
        await act(node)
    assert copy.exists(), f"step {step!r} was not passed"
    return copy


async def test_stop_between_rename_and_row_leaves_rubbish_that_goes(tmp_path: Path) -> None:
    copy = await crash(tmp_path, "renamed", put)
    async with opened(copy) as node:
        assert blob_name(DIGEST) in node.files()
        found = await node.store.reconcile()
        assert len(found.files) == 1
        assert len(found.empty_ingests) == 1
        assert node.files() == []
        assert not await node.store.reconcile()
        with pytest.raises(NotFound):
            await node.store.info("a", DIGEST)
        assert await put(node) == DIGEST


async def test_stop_after_the_row_keeps_the_blob_and_drops_the_ingest(tmp_path: Path) -> None:
    copy = await crash(tmp_path, "recorded", put)
    async with opened(copy) as node:
        found = await node.store.reconcile()
        assert (found.files, found.lost_blobs) == ((), ())
        assert await node.store.read("a", DIGEST) == DATA
        assert list((copy / "content" / "ingest").iterdir()) == []


async def test_stop_before_the_row_of_an_ingest_drops_its_directory(tmp_path: Path) -> None:
    copy = await crash(tmp_path, "ingest opened", put)
    async with opened(copy) as node:
        found = await node.store.reconcile()
        assert len(found.directories) == 1
        assert node.files() == []
        assert await node.store.statuses("a") == []


async def test_stop_between_row_and_file_of_a_delete_removes_the_file(tmp_path: Path) -> None:
    async def put_and_delete(node: Node) -> None:
        await put(node)
        await node.store.delete("a", DIGEST)

    copy = await crash(tmp_path, "released", put_and_delete)
    async with opened(copy) as node:
        assert node.files() == [blob_name(DIGEST)]
        await node.store.reconcile()
        assert node.files() == []


async def test_stop_within_an_abort_removes_the_directory(tmp_path: Path) -> None:
    async def write_and_abort(node: Node) -> None:
        async with await node.store.writer("a", "ref") as writer:
            await writer.write(DATA)
        await node.store.abort("a", "ref")

    copy = await crash(tmp_path, "ingest dropped", write_and_abort)
    async with opened(copy) as node:
        assert len((await node.store.reconcile()).directories) == 1
        assert node.files() == []


async def test_reconcile_forgets_a_blob_whose_file_was_removed(node: Node) -> None:
    await put(node)
    (await node.store.path("a", DIGEST)).unlink()
    assert (await node.store.reconcile()).lost_blobs == (DIGEST,)
    with pytest.raises(NotFound):
        await node.store.info("a", DIGEST)
    assert await put(node) == DIGEST


async def test_release_spares_what_a_namespace_still_has(node: Node) -> None:
    await put(node)
    assert await node.store.release([DIGEST]) == 0
    assert await node.store.read("a", DIGEST) == DATA


async def test_data_that_the_disk_has_no_room_for_is_refused_before_it_comes(
    tmp_path: Path,
) -> None:
    async with open_metadata(tmp_path) as meta:
        floor = DiskFloor(tmp_path, 1 << 20)
        store = LocalContentStore(
            tmp_path, meta.db, events=meta.journal, gc_lock=GcLock(), floor=floor
        )
        with pytest.raises(ResourceExhausted, match="must stay free"):
            await store.writer("a", "big", total_bytes=1 << 50)
        assert await store.statuses("a") == []
        assert list((tmp_path / "content/ingest").iterdir()) == []
        async with await store.writer("a", "grows") as writer:
            await writer.write(b"x")
            store._floor._floor_bytes = 1 << 60  # others have filled the disk
            with pytest.raises(ResourceExhausted, match="must stay free"):
                for _ in range(20):
                    await writer.write(bytes(1 << 20))
            assert writer.offset_bytes < 10 << 20


async def test_update_follows_the_field_mask(node: Node) -> None:
    await put(node, labels={"a": "1", "b": "2"})
    info = await node.store.update("a", DIGEST, {"a": "x", "c": "3"}, ["labels.a", "labels.b"])
    assert info.labels == {"a": "x"}
    info = await node.store.update("a", DIGEST, {"only": "this"}, ["labels"])
    assert info.labels == {"only": "this"}
    assert (await node.store.update("a", DIGEST, {})).labels == {}
    with pytest.raises(InvalidArgument, match="size"):
        await node.store.update("a", DIGEST, {}, ["size"])
    with pytest.raises(InvalidArgument, match="4096"):
        await node.store.update("a", DIGEST, {"k": "v" * 4096})
    with pytest.raises(NotFound):
        await node.store.update("b", DIGEST, {})


async def test_chunks_give_a_range_and_refuse_an_offset_past_the_end(node: Node) -> None:
    data = bytes(range(256)) * 8192  # 2 MiB: more than one chunk
    digest = await put(node, data)
    got = [chunk async for chunk in node.store.chunks("a", digest)]
    assert len(got) == 2
    assert b"".join(got) == data
    part = [chunk async for chunk in node.store.chunks("a", digest, offset=10, size_bytes=20)]
    assert b"".join(part) == data[10:30]
    tail = [chunk async for chunk in node.store.chunks("a", digest, offset=len(data) - 3)]
    assert b"".join(tail) == data[-3:]
    with pytest.raises(OutOfRange):
        await anext(aiter(node.store.chunks("a", digest, offset=len(data) + 1)))


async def test_read_refuses_what_is_too_large(node: Node) -> None:
    await put(node)
    with pytest.raises(ResourceExhausted, match="more than"):
        await node.store.read("a", DIGEST, max_bytes=10)


async def test_delete_tells_and_is_not_found_the_second_time(node: Node) -> None:
    await put(node)
    await node.store.delete("a", DIGEST)
    assert node.events.seen[-1] == ("a", "/content/delete", {"digest": DIGEST})
    with pytest.raises(NotFound):
        await node.store.delete("a", DIGEST)


async def under_lease(node: Node, lease: str) -> list[tuple[str, str]]:
    await node.db.write(lambda tx: leases.insert(tx, "a", lease, {}, now_ns=1))
    current_lease.set(lease)
    return await resources(node, lease)


async def resources(node: Node, lease: str) -> list[tuple[str, str]]:
    found = await node.db.read(lambda tx: leases.resources(tx, "a", lease))
    return [(row["type"], row["id"]) for row in found]


async def test_blobs_and_ingests_go_under_the_current_lease(node: Node) -> None:
    await under_lease(node, "l1")
    async with await node.store.writer("a", "ref") as writer:
        assert await resources(node, "l1") == [("ingests", "ref")]
        await writer.write(DATA)
        await writer.commit()
    assert await resources(node, "l1") == [("content", DIGEST)]
    await under_lease(node, "l2")
    with pytest.raises(AlreadyExists):
        await node.store.writer("a", "ref", expected=DIGEST)
    assert await resources(node, "l2") == [("content", DIGEST)]


async def test_a_lease_that_is_gone_leaves_nothing_behind(node: Node) -> None:
    current_lease.set("gone")
    with pytest.raises(NotFound, match="lease"):
        await node.store.writer("a", "ref")
    assert list((node.root / "content" / "ingest").iterdir()) == []
    current_lease.set("")
    async with await node.store.writer("a", "ref"):
        pass  # the ref is free


async def test_a_cancelled_commit_is_complete_or_leaves_the_ingest(node: Node) -> None:
    writer = await node.store.writer("a", "ref")
    await writer.write(DATA)
    task = asyncio.ensure_future(writer.commit())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not await node.store.reconcile()
    async with await node.store.writer("a", "ref"):
        pass  # the ref is free


@pytest.mark.parametrize(
    "digest",
    [
        "",
        "sha256",
        "sha256:",
        "sha256:abc",
        "sha256:" + "A" * 64,
        "md5:" + "0" * 32,
        "sha256:../../../../etc/passwd",
        "sha256:" + "0" * 63 + "\n",
    ],
)
async def test_what_is_no_digest_is_refused(node: Node, digest: str) -> None:
    with pytest.raises(InvalidArgument):
        await node.store.info("a", digest)
    with pytest.raises(InvalidArgument):
        await node.store.delete("a", digest)


async def test_an_empty_ref_is_refused(node: Node) -> None:
    with pytest.raises(InvalidArgument, match="ref"):
        await node.store.writer("a", "")


def test_chain_ids_are_those_of_the_image_spec() -> None:
    a, b, c = (digest_of(x) for x in (b"a", b"b", b"c"))
    ab = "sha256:" + hashlib.sha256(f"{a} {b}".encode()).hexdigest()
    abc = "sha256:" + hashlib.sha256(f"{ab} {c}".encode()).hexdigest()
    assert chain_ids([a, b, c]) == [a, ab, abc]
    assert chain_ids([]) == []
