"""Garbage collection: which labels keep what, what goes, and the lock and schedule around it."""

from __future__ import annotations

import asyncio
import hashlib
import json
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest

from services.common.background import Background
from services.common.errors import AlreadyExists, Unavailable
from services.containerd.containers.store import Container
from services.containerd.content.descriptor import Descriptor
from services.containerd.content.local import LocalContentStore
from services.containerd.gc.collector import Collector
from services.containerd.gc.conditions import holds
from services.containerd.gc.graph import Node
from services.containerd.gc.lock import GcLock
from services.containerd.images.store import Image
from services.containerd.leases.lease import Resource, current_lease
from services.containerd.metadata import snapshots as snapshot_rows
from services.containerd.typed import TypedValue
from tests.fakes.metadata import Metadata, open_metadata

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
    from pathlib import Path

NS = "test"
PAST, FUTURE = "2020-01-01T00:00:00Z", "2100-01-01T00:00:00Z"
REF = "containerd.io/gc.ref."
COND = "containerd.io/gc.cond."
SNAPSHOTS = "snapshots/overlayfs"


@dataclass
class Cleaned:
    """A snapshotter that only counts its cleanups."""

    count: int = 0

    async def cleanup(self) -> None:
        self.count += 1


@dataclass
class Stage:
    meta: Metadata
    content: LocalContentStore
    collector: Collector
    lock: GcLock
    root: Path
    snapshotter: Cleaned = field(default_factory=Cleaned)
    ids: int = 0

    async def blob(
        self, text: str, labels: Mapping[str, str] | None = None, *, namespace: str = NS
    ) -> str:
        data = text.encode()
        digest = "sha256:" + hashlib.sha256(data).hexdigest()
        async with await self.content.writer(namespace, f"ref-{text}", expected=digest) as writer:
            if writer.offset_bytes == 0:
                await writer.write(data)
            await writer.commit(labels=labels or {})
        return digest

    async def snapshot(
        self,
        key: str,
        parent: str = "",
        labels: Mapping[str, str] | None = None,
        *,
        committed: bool = True,
    ) -> None:
        self.ids += 1
        space = snapshot_rows.Space("overlayfs", NS)
        number = self.ids
        await self.meta.db.write(
            lambda tx: tx.execute(
                "INSERT INTO snapshots (id, snapshotter, namespace, key, parent_id, kind, labels,"
                " created_at_ns, updated_at_ns) VALUES (?, ?, ?, ?, ?, ?, ?, 1, 1)",
                (
                    number,
                    space.snapshotter,
                    space.namespace,
                    key,
                    snapshot_rows.get(tx, space, parent).id if parent else None,
                    3 if committed else 2,
                    json.dumps(dict(labels or {})),
                ),
            )
        )

    async def image(self, name: str, digest: str, labels: Mapping[str, str] | None = None) -> None:
        await self.meta.images.create(NS, Image(name, Descriptor("t", digest, 1), labels or {}))

    async def container(
        self, name: str, snapshot: str = "", labels: Mapping[str, str] | None = None
    ) -> None:
        await self.meta.containers.create(
            NS,
            Container(
                name,
                "r",
                spec=TypedValue("s", b""),
                snapshotter="overlayfs" if snapshot else "",
                snapshot_key=snapshot,
                labels=labels or {},
            ),
        )

    async def left(self) -> set[str]:
        """What is recorded, by kind and name, after a collection."""
        await self.collector.collect()

        return await self.meta.db.read(
            lambda tx: {
                f"{kind}:{row[0]}"
                for kind, query in (
                    ("content", "SELECT digest FROM content"),
                    ("image", "SELECT name FROM images"),
                    ("snapshot", "SELECT key FROM snapshots"),
                    ("lease", "SELECT id FROM leases"),
                    ("ingest", "SELECT ref FROM ingests"),
                )
                for row in tx.execute(query)
            }
        )

    def files(self) -> set[str]:
        return {
            path.name for path in (self.root / "content" / "blobs").rglob("*") if path.is_file()
        }


@asynccontextmanager
async def open_node(directory: Path) -> AsyncIterator[Stage]:
    async with open_metadata(directory) as meta:
        lock = GcLock()
        content = LocalContentStore(directory, meta.db, events=meta.journal, gc_lock=lock)
        snapshotter = Cleaned()
        collector = Collector(
            meta.db,
            meta.journal,
            lock,
            content=content,
            snapshotters={"overlayfs": snapshotter},
        )
        yield Stage(meta, content, collector, lock, directory, snapshotter)


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Stage]:
    async with open_node(tmp_path) as opened:
        yield opened


async def test_a_collection_that_finds_nothing_keeps_nobody_waiting(node: Stage) -> None:
    await node.image("x", await node.blob("manifest"))
    commits: list[None] = []
    node.meta.db.on_commit(lambda: commits.append(None))
    async with node.lock.shared(), asyncio.timeout(5):
        assert (await node.collector.collect()).removed == ()
    assert commits == []
    await node.blob("loose")
    del commits[:]
    assert len((await node.collector.collect()).removed) == 1
    assert commits


async def test_an_image_keeps_its_whole_tree_and_nothing_else(node: Stage) -> None:
    layer = await node.blob("layer")
    await node.snapshot("lower")
    await node.snapshot("upper", "lower")
    await node.snapshot("loose", "lower")
    config = await node.blob("config", {f"{REF}snapshot.overlayfs": "upper"})
    manifest = await node.blob(
        "manifest", {f"{REF}content.config": config, f"{REF}content.l.0": layer}
    )
    index = await node.blob("index", {f"{REF}content.m.0": manifest})
    loose = await node.blob("loose")
    await node.image("x", index)
    assert await node.left() == {
        *(f"content:{digest}" for digest in (index, manifest, config, layer)),
        "image:x",
        "snapshot:lower",
        "snapshot:upper",
    }
    assert loose.removeprefix("sha256:") not in node.files()
    assert len(node.files()) == 4
    assert node.snapshotter.count == 1
    await node.meta.images.delete(NS, "x")
    assert await node.left() == set()
    assert node.files() == set()


async def test_collect_says_what_it_removed_and_tells_of_snapshots(node: Stage) -> None:
    digest = await node.blob("blob")
    await node.snapshot("parent")
    await node.snapshot("child", "parent")
    collection = await node.collector.collect()
    assert set(collection.removed) == {
        Node("content", NS, digest),
        Node(SNAPSHOTS, NS, "child"),
        Node(SNAPSHOTS, NS, "parent"),
    }
    assert collection.freed_bytes == 4
    removals = [
        event.key for _, topic, event in await node.meta.events() if topic == "/snapshot/remove"
    ]
    assert removals == ["child", "parent"]


async def test_children_of_any_age_go_before_their_parents(node: Stage) -> None:
    for key in "abcd":
        await node.snapshot(key)

    def stack(tx: object) -> None:  # d on nothing, c on d, b on c, a on b: ids say the opposite
        for child, parent in ((1, 2), (2, 3), (3, 4)):
            tx.execute("UPDATE snapshots SET parent_id = ? WHERE id = ?", (parent, child))  # type: ignore[attr-defined]

    await node.meta.db.write(stack)
    assert await node.left() == set()


async def test_a_container_keeps_its_snapshot_and_its_labels(node: Stage) -> None:
    digest = await node.blob("checkpoint")
    await node.snapshot("image")
    await node.snapshot("rw", "image", committed=False)
    await node.snapshot("other", committed=False)
    await node.container("c", "rw", {f"{REF}content": digest})
    assert await node.left() == {f"content:{digest}", "snapshot:image", "snapshot:rw"}
    await node.meta.containers.delete(NS, "c")
    assert await node.left() == set()


async def test_root_labels_keep_what_has_them(node: Stage) -> None:
    child = await node.blob("child")
    root = await node.blob("root", {"containerd.io/gc.root": PAST, f"{REF}content/child": child})
    await node.snapshot("base")
    await node.snapshot("rooted", "base", {"containerd.io/gc.root": ""})
    await node.snapshot("marked", "base", {"containerd.io/gc.root": "yes"})
    await node.blob("loose")
    assert await node.left() == {
        f"content:{root}",
        f"content:{child}",
        "snapshot:base",
        "snapshot:marked",
        "snapshot:rooted",
    }


async def test_labels_that_only_look_like_references_keep_nothing(node: Stage) -> None:
    child = await node.blob("child")
    root = await node.blob(
        "root",
        {
            "containerd.io/gc.root": "1",
            f"{REF}contents": child,
            "containerd.io/gc.reference.content": child,
            "gc.ref.content": child,
            f"{REF}snapshot": "s",
        },
    )
    await node.snapshot("s")
    assert await node.left() == {f"content:{root}"}


async def test_a_conditional_reference_keeps_a_snapshot_that_was_used_lately(node: Stage) -> None:
    config = await node.blob("config", {f"{COND}snapshot.overlayfs": "usedat<24h|of content"})
    conditions = {
        f"{COND}snapshot.overlayfs/a": "usedat<1h30m|lately",
        f"{COND}snapshot/overlayfs/b": "usedat<10ms,usedat>87600h|long ago",
        f"{COND}snapshot.overlayfs/c": "usedat<24h|never",
        f"{COND}snapshot.overlayfs/d": "usedat<24h|yesterday",
        f"{COND}snapshot.native/e": "usedat<24h|elsewhere",
        f"{REF}content": config,
    }
    await node.image("x", config, conditions)
    now = datetime.now(UTC)
    for key, at in (
        ("lately", now - timedelta(hours=1)),
        ("long ago", now - timedelta(days=10_000)),
        ("yesterday", now - timedelta(hours=25)),
        ("elsewhere", now),
        ("of content", now),
        ("nobody's", now),
    ):
        await node.snapshot(key, "", {f"{COND}value-usedat": at.isoformat()})
    await node.snapshot("never")
    kept = {"snapshot:lately", "snapshot:long ago", "snapshot:of content"}
    assert await node.left() == {"image:x", f"content:{config}", *kept}
    await node.meta.images.delete(NS, "x")
    assert await node.left() == set()


@pytest.mark.parametrize(
    ("conditions", "met"),
    [
        ("usedat<2h", True),
        ("usedat<60m", False),
        ("usedat<60m1s", True),
        ("usedat>3599.5s", True),
        ("usedat>3600000ms", False),
        ("usedat<1s,usedat>1s", True),
        ("usedat<=2h", False),
        ("usedat==2h", False),
        ("usedat<2", False),
        ("usedat<", False),
        ("usedat", False),
        ("madeat<2h", False),
        ("", False),
    ],
)
def test_conditions(conditions: str, met: bool) -> None:
    assert holds(conditions, "2020-01-01T00:00:00Z", now_ns=1577840400 * 10**9) == met
    assert not holds(conditions, "yesterday", now_ns=1577840400 * 10**9)


async def test_references_to_nothing_and_circles_do_no_harm(node: Stage) -> None:
    first = "sha256:" + hashlib.sha256(b"first").hexdigest()
    second = await node.blob("second", {f"{REF}content.a": first})
    await node.blob("first", {f"{REF}content.a": second, f"{REF}content.b": "sha256:nothing"})
    await node.image("x", first)
    await node.container("c", "no such snapshot")
    assert await node.left() == {f"content:{first}", f"content:{second}", "image:x"}
    await node.meta.images.delete(NS, "x")
    assert await node.left() == set()


async def test_an_image_can_keep_another_one(node: Stage) -> None:
    target, other = await node.blob("target"), await node.blob("other")
    await node.image("x", target, {f"{REF}image.base": "y"})
    await node.image("y", other, {"containerd.io/gc.expire": PAST})
    await node.image("z", other, {"containerd.io/gc.expire": PAST})
    assert await node.left() == {f"content:{target}", f"content:{other}", "image:x", "image:y"}
    assert (await node.meta.topics())[-1] == "/images/delete"


async def test_an_expiry_that_is_to_come_or_malformed_keeps(node: Stage) -> None:
    digest = await node.blob("blob")
    await node.image("soon", digest, {"containerd.io/gc.expire": FUTURE})
    await node.image("odd", digest, {"containerd.io/gc.expire": "some day"})
    assert await node.left() == {f"content:{digest}", "image:soon", "image:odd"}


async def test_a_back_reference_ties_a_child_to_its_parent(node: Stage) -> None:
    target = await node.blob("target")
    referrer = await node.blob("referrer", {"containerd.io/gc.bref.content.subject": target})
    await node.blob("stray", {"containerd.io/gc.bref.image": "none"})
    await node.image("x", target)
    await node.snapshot("s", labels={"containerd.io/gc.bref.container": "c"})
    await node.container("c")
    assert await node.left() == {
        f"content:{target}",
        f"content:{referrer}",
        "image:x",
        "snapshot:s",
    }


async def test_a_lease_keeps_what_is_under_it_until_it_goes(node: Stage) -> None:
    lease = await node.meta.leases.create(NS, "l")
    token = current_lease.set(lease.id)
    child = await node.blob("child")
    parent = await node.blob("parent", {f"{REF}content": child})
    current_lease.reset(token)
    await node.snapshot("s")
    await node.meta.leases.add(NS, "l", Resource(SNAPSHOTS, "s"))
    await node.blob("loose")
    kept = {f"content:{child}", f"content:{parent}", "snapshot:s", "lease:l"}
    assert await node.left() == kept
    await node.meta.leases.delete(NS, "l")
    assert await node.left() == set()


async def test_an_expired_lease_goes_with_what_it_kept(node: Stage) -> None:
    await node.meta.leases.create(NS, "old", {"containerd.io/gc.expire": PAST})
    await node.meta.leases.create(NS, "new", {"containerd.io/gc.expire": FUTURE})
    first, second = await node.blob("first"), await node.blob("second")
    await node.meta.leases.add(NS, "old", Resource("content", first))
    await node.meta.leases.add(NS, "new", Resource("content", second))
    assert await node.left() == {f"content:{second}", "lease:new"}


async def test_a_flat_lease_keeps_parents_but_follows_no_labels(node: Stage) -> None:
    child = await node.blob("child")
    parent = await node.blob("parent", {f"{REF}content": child})
    await node.snapshot("base", labels={f"{REF}content": child})
    await node.snapshot("top", "base")
    await node.meta.leases.create(NS, "flat", {"containerd.io/gc.flat": "1"})
    await node.meta.leases.add(NS, "flat", Resource("content", parent))
    await node.meta.leases.add(NS, "flat", Resource(SNAPSHOTS, "top"))
    assert await node.left() == {
        f"content:{parent}",
        "snapshot:base",
        "snapshot:top",
        "lease:flat",
    }


async def test_namespaces_do_not_keep_for_one_another(node: Stage) -> None:
    digest = await node.blob("shared")
    await node.blob("shared", namespace="other")
    await node.image("x", digest)
    await node.left()
    rows = await node.meta.db.read(
        lambda tx: tx.execute("SELECT namespace FROM content").fetchall()
    )
    assert [row[0] for row in rows] == [NS]
    assert len(node.files()) == 1


async def test_ingests_stay_a_day_and_keep_what_they_expect(node: Stage) -> None:
    async with await node.content.writer(NS, "young") as writer:
        await writer.write(b"x")
    async with await node.content.writer(NS, "old") as writer:
        await writer.write(b"x")
    await node.meta.db.write(
        lambda tx: tx.execute("UPDATE ingests SET updated_at_ns = 1 WHERE ref = 'old'")
    )
    assert await node.left() == {"ingest:young"}
    assert len(list((node.root / "content" / "ingest").iterdir())) == 1


async def test_work_under_leases_survives_collections_all_the_time(node: Stage) -> None:
    async def work(number: int) -> None:
        for turn in range(10):
            name = f"i{number}-{turn}"
            async with node.meta.leases.hold(NS):
                layer = await node.blob(f"layer {name}")
                shared = await _blob_or_existing(node, "shared layer")
                await asyncio.sleep(0)
                manifest = await node.blob(
                    f"manifest {name}", {f"{REF}content.0": layer, f"{REF}content.1": shared}
                )
                await node.image(name, manifest)
            for digest in (layer, shared, manifest):
                path = await node.content.path(NS, digest)
                assert path.exists(), digest
            await node.meta.images.delete(NS, name)

    async def collect() -> None:
        while True:
            await node.collector.collect()

    async with Background() as background:
        background.start(collect(), name="collections")
        await asyncio.gather(*(work(number) for number in range(4)))
    assert await node.left() == set()
    assert node.files() == set()


async def _blob_or_existing(node: Stage, text: str) -> str:
    while True:
        try:
            return await node.blob(text)
        except AlreadyExists:
            return "sha256:" + hashlib.sha256(text.encode()).hexdigest()
        except Unavailable:  # somebody else writes it
            await asyncio.sleep(0.001)


async def test_the_lock_keeps_the_collector_out_and_then_everybody_else() -> None:
    lock = GcLock()
    order: list[str] = []
    inside = asyncio.Event()
    leave = asyncio.Event()

    async def worker(name: str, *, stay: bool = False) -> None:
        async with lock.shared():
            order.append(f"{name} in")
            inside.set()
            if stay:
                await leave.wait()
            order.append(f"{name} out")

    async def collector() -> None:
        async with lock.exclusive():
            order.append("collector")

    async with asyncio.TaskGroup() as group:
        group.create_task(worker("a", stay=True))
        await inside.wait()
        group.create_task(collector())
        for _ in range(5):
            await asyncio.sleep(0)
        group.create_task(worker("late"))
        for _ in range(5):
            await asyncio.sleep(0)
        assert order == ["a in"]
        leave.set()
    assert order == ["a in", "a out", "collector", "late in", "late out"]


async def test_a_collector_that_gives_up_waiting_lets_workers_in() -> None:
    lock = GcLock()
    async with lock.shared():
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01), lock.exclusive():
                pass
        async with asyncio.timeout(1), lock.shared():
            pass
    async with asyncio.timeout(1), lock.exclusive():
        pass
