"""What is particular to snapshots that another service keeps: crashes, absences, surprises."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import pytest

from services.common.errors import AlreadyExists, InvalidArgument, NotFound, Unimplemented
from services.common.errors import Unavailable as Gone
from services.containerd.config import parse
from services.containerd.config_file import ProxySnapshotter, read_config_file
from services.containerd.gc.collector import Collector
from services.containerd.gc.lock import GcLock
from services.containerd.gc.policy import GcPolicy
from services.containerd.metadata import leftovers
from services.containerd.snapshots.overlay import OverlaySnapshotter
from services.containerd.snapshots.recorded import TARGET_LABEL
from services.containerd.snapshots.remote import RemoteSnapshotter
from services.containerd.snapshots.snapshotter import Kind
from tests.fakes.snapshot_collaborators import RecordedEvents, RecordedLeases
from tests.fakes.snapshotters import opened_database

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path
    from typing import Any

NS = "test"
SCHEDULER = '[plugins."io.containerd.gc.v1.scheduler"]\n'


class Crash(Exception):
    pass


class Service(OverlaySnapshotter):
    """The service: its calls can end after, or instead of, what they do."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.lost_answer = ""
        self.gone = False

    async def prepare(self, *arguments: Any, **options: Any) -> Any:
        target = (arguments[3] or {}).get(TARGET_LABEL)
        if target and any(i.labels.get(TARGET_LABEL) == target for i in await self.infos(NS)):
            raise AlreadyExists(target)
        return self._answer("prepare", await self._asked(super().prepare(*arguments, **options)))

    async def commit(self, *arguments: Any, **options: Any) -> None:
        self._answer("commit", await self._asked(super().commit(*arguments, **options)))

    async def remove(self, *arguments: Any, **options: Any) -> None:
        self._answer("remove", await self._asked(super().remove(*arguments, **options)))

    async def _asked(self, call: Any) -> Any:
        if self.gone:
            call.close()
            raise Gone("the service is not there")
        return await call

    def _answer(self, name: str, result: Any) -> Any:
        if self.lost_answer == name:
            self.lost_answer = ""
            raise Gone("the connection broke")
        return result

    async def names(self) -> list[str]:
        return [info.name.partition("/")[2] for info in await self.infos(NS)]


class Node:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.stop_at = ""
        self.leases = RecordedLeases()
        self.events = RecordedEvents()

    def trace(self, step: str) -> None:
        if step == self.stop_at:
            raise Crash(step)

    async def start(self, stack: AsyncExitStack) -> None:
        other = await stack.enter_async_context(opened_database(self.root / "there.db"))
        self.service = Service(
            self.root / "there", other, events=RecordedEvents(), leases=RecordedLeases()
        )
        self.service.name = "proxy"  # type: ignore[misc]
        await self.service.open()
        self.db = await stack.enter_async_context(opened_database(self.root / "meta.db"))
        await self.reopen()

    async def reopen(self) -> None:
        self.stop_at = ""
        self.remote = RemoteSnapshotter(
            self.service, self.db, events=self.events, leases=self.leases, trace=self.trace
        )
        await self.remote.open()

    async def leftovers(self) -> list[str]:
        found = await self.db.read(lambda tx: leftovers.list_all(tx, "proxy"))
        return [backend for _, backend in found]


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    async with AsyncExitStack() as stack:
        node = Node(tmp_path)
        await node.start(stack)
        yield node


async def test_names_there_are_of_this_root_and_parents_are_mapped(node: Node) -> None:
    await node.remote.prepare(NS, "key", "", {"containerd.io/snapshot/x": "1", "own": "2"})
    await node.remote.commit(NS, "base", "key", {"containerd.io/snapshot/y": "3", "own": "4"})
    await node.remote.prepare(NS, "work", "base")
    first, second = await node.service.infos(NS)
    assert first.name.startswith(f"{NS}/1-") and first.name.endswith("/key committed")
    assert dict(first.labels) == {"containerd.io/snapshot/y": "3"}
    assert second.name.endswith("/work") and second.parent == first.name
    assert await node.leftovers() == []
    await node.remote.update(NS, "base", {"containerd.io/snapshot/y": "5"}, ["labels"])
    assert (await node.service.stat(NS, first.name)).labels["containerd.io/snapshot/y"] == "5"


async def test_a_crash_before_the_row_leaves_what_cleanup_has_removed(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def nothing(_new: object) -> None:
        """A dead process undoes nothing."""

    monkeypatch.setattr(node.remote, "_unmake", nothing)
    node.stop_at = "directory made"
    with pytest.raises(Crash):
        await node.remote.prepare(NS, "work", "")
    assert len(await node.service.names()) == len(await node.leftovers()) == 1
    await node.reopen()
    await node.remote.prepare(NS, "work", "")
    await node.remote.cleanup()
    assert len(await node.service.names()) == 1
    assert await node.leftovers() == []
    assert (await node.remote.mounts(NS, "work"))[0].source.endswith("/2/fs")


async def test_a_crash_within_a_commit_is_made_good_by_the_next(node: Node) -> None:
    await node.remote.prepare(NS, "key", "")
    node.stop_at = "synced"
    with pytest.raises(Crash):
        await node.remote.commit(NS, "name", "key")
    await node.reopen()
    assert (await node.remote.stat(NS, "key")).kind == Kind.ACTIVE
    await node.remote.commit(NS, "other", "key")
    assert (await node.remote.stat(NS, "other")).kind == Kind.COMMITTED
    await node.remote.prepare(NS, "work", "other")


async def test_a_crash_within_a_commit_does_not_hinder_a_removal(node: Node) -> None:
    await node.remote.prepare(NS, "key", "")
    node.stop_at = "synced"
    with pytest.raises(Crash):
        await node.remote.commit(NS, "name", "key")
    await node.reopen()
    await node.remote.remove(NS, "key")
    assert await node.service.names() == await node.leftovers() == []


async def test_an_answer_that_was_lost_does_no_harm(node: Node) -> None:
    node.service.lost_answer = "prepare"
    with pytest.raises(Gone):
        await node.remote.prepare(NS, "work", "")
    assert await node.service.names() == await node.leftovers() == []
    await node.remote.prepare(NS, "work", "")
    node.service.lost_answer = "commit"
    with pytest.raises(Gone):
        await node.remote.commit(NS, "name", "work")
    await node.remote.commit(NS, "name", "work")
    node.service.lost_answer = "remove"
    await node.remote.remove(NS, "name")
    assert len(await node.leftovers()) == 1
    await node.remote.cleanup()
    assert await node.service.names() == await node.leftovers() == []


async def test_a_service_that_is_away_is_told_of_removals_later(node: Node) -> None:
    await node.remote.prepare(NS, "1", "")
    await node.remote.commit(NS, "one", "1")
    await node.remote.prepare(NS, "two", "one")
    node.service.gone = True
    with pytest.raises(Gone):
        await node.remote.prepare(NS, "three", "one")
    await node.remote.remove(NS, "two")
    await node.remote.remove(NS, "one")
    assert await node.remote.infos(NS) == []
    assert len(await node.service.names()) == 2
    with pytest.raises(Gone):
        await node.remote.cleanup()
    node.service.gone = False
    await node.remote.cleanup()
    assert await node.service.names() == await node.leftovers() == []


async def test_the_collector_removes_through_the_service(node: Node) -> None:
    class Content:
        async def release(self, digests: object) -> int:
            return 0

        async def abort(self, namespace: str, ref: str) -> None:
            raise AssertionError

    await node.remote.prepare(NS, "1", "")
    await node.remote.commit(NS, "one", "1")
    await node.remote.prepare(NS, "two", "one")
    await node.remote.prepare(NS, "kept", "", {"containerd.io/gc.root": "yes"})
    collector = Collector(
        node.db, node.events, GcLock(), content=Content(), snapshotters={"proxy": node.remote}
    )
    node.service.gone = True
    assert len((await collector.collect()).removed) == 2
    assert len(await node.service.names()) == 3
    node.service.gone = False
    assert (await collector.collect()).removed == ()
    assert [name.rpartition("/")[2] for name in await node.service.names()] == ["kept"]


async def test_a_snapshot_that_the_service_knows_is_recorded(node: Node) -> None:
    there = node.service
    await there.prepare(NS, "x", "", {})
    await there.commit(NS, "its own name", "x", {TARGET_LABEL: "chain"})
    node.leases.lease = "held"
    with pytest.raises(AlreadyExists, match="'chain'"):
        await node.remote.prepare(NS, "extract", "", {TARGET_LABEL: "chain"})
    info = await node.remote.stat(NS, "chain")
    assert (info.kind, info.parent) == (Kind.COMMITTED, "")
    assert (NS, "held", "snapshots/proxy", "chain") in node.leases.held
    assert await node.leftovers() == []
    await node.remote.prepare(NS, "work", "chain")
    assert (await there.infos(NS))[-1].parent == "its own name"


async def test_a_service_that_says_so_and_has_it_not(node: Node) -> None:
    await node.service.prepare(NS, "x", "", {TARGET_LABEL: "chain"})
    # It is not committed.
    with pytest.raises(NotFound, match="says that 'chain' exists"):
        await node.remote.prepare(NS, "extract", "", {TARGET_LABEL: "chain"})
    assert await node.remote.infos(NS) == []
    assert await node.leftovers() == []


def test_proxy_plugins_are_read_from_a_config_file(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(
        'version = 2\n[plugins]\n[proxy_plugins.stargz]\ntype = "snapshot"\n'
        'address = "/run/s.sock"\ncapabilities = ["rebase"]\n'
        '[proxy_plugins.other]\ntype = "snapshot"\naddress = "unix:///o"\n'
    )
    assert read_config_file(file).proxy_snapshotters == (
        ProxySnapshotter("stargz", "/run/s.sock", ("rebase",)),
        ProxySnapshotter("other", "unix:///o"),
    )
    assert read_config_file(file).gc == GcPolicy()


def test_the_schedule_of_collections_is_read_from_a_config_file(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(
        '[plugins."io.containerd.gc.v1.scheduler"]\npause_threshold = 0.1\n'
        'deletion_threshold = 3\nmutation_threshold = 0\nschedule_delay = "1.5s"\n'
        'startup_delay = "0s"\n'
    )
    assert read_config_file(file).gc == GcPolicy(0.1, 3, 0, 1.5, 0.0)
    options = ["--config", str(file), "--gc-startup-delay", "7", "--gc-deletion-threshold", "0"]
    assert parse(options).gc == GcPolicy(0.1, 0, 0, 1.5, 7.0)


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ('[proxy_plugins.x]\ntype = "content"\naddress = "/s"', Unimplemented, "'content'"),
        ('[proxy_plugins.x]\ntype = "snapshot"', InvalidArgument, "needs an address"),
        ('[proxy_plugins.x]\ntype = "snapshot"\naddress = "tcp:1"', InvalidArgument, "address"),
        ('[proxy_plugins.native]\ntype = "snapshot"\naddress = "/s"', InvalidArgument, "is here"),
        ('[proxy_plugins.x]\ntype = "snapshot"\nadress = "/s"', InvalidArgument, "'adress'"),
        ('[proxy_plugins."a b"]\ntype = "snapshot"\naddress = "/s"', InvalidArgument, "a b"),
        ("[proxy_plugins]\nx = 1", InvalidArgument, "no table"),
        ("proxy_plugins = 1", InvalidArgument, "no table"),
        ("=", InvalidArgument, "config"),
        (f"{SCHEDULER}pause_threshold = -0.1", InvalidArgument, "-0.1, not a number"),
        (f"{SCHEDULER}deletion_threshold = 0.5", InvalidArgument, "0.5, not a whole number"),
        (f"{SCHEDULER}mutation_threshold = true", InvalidArgument, "True, not a whole number"),
        (f"{SCHEDULER}schedule_delay = 5", InvalidArgument, "5, not a time"),
        (f"{SCHEDULER}pause = 5", InvalidArgument, "'pause', and can have pause_threshold"),
    ],
)
def test_config_files_that_make_no_sense(
    tmp_path: Path, text: str, error: type[Exception], words: str
) -> None:
    file = tmp_path / "config.toml"
    file.write_text(text)
    with pytest.raises(error, match=words):
        read_config_file(file)


def test_a_config_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="nowhere"):
        read_config_file(tmp_path / "nowhere")
