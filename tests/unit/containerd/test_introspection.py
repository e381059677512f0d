"""The list of plugins, as clients ask for it, and the metrics that go with what is recorded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from services.common.errors import InvalidArgument
from services.common.metrics import Registry
from services.containerd import plugins
from services.containerd.content.descriptor import Descriptor, Platform
from services.containerd.gc.collector import Collection
from services.containerd.gc.graph import Node
from services.containerd.gc.policy import GcPolicy
from services.containerd.images.store import Image
from services.containerd.metadata import meta as meta_rows
from services.containerd.metrics import ContainerdMetrics, join_pages
from tests.fakes.metadata import open_metadata

if TYPE_CHECKING:
    from pathlib import Path

ALL = plugins.list_plugins(
    platform=Platform("linux", "amd64"),
    content_root="/r/content",
    snapshotters={
        "overlayfs": plugins.Plugged({"root": "/r/snapshots/overlayfs"}, ("rebase", "remap-ids"))
    },
    gc=GcPolicy(schedule_delay_s=0.5),
)


def test_a_client_finds_the_snapshotter_with_its_platform() -> None:
    [found] = plugins.find(ALL, [f"type=={plugins.SNAPSHOTTER},id==overlayfs"])
    assert found.platforms == (Platform("linux", "amd64"),)
    assert found.exports == {"root": "/r/snapshots/overlayfs"}
    assert found.capabilities == ("rebase", "remap-ids")


def test_a_client_finds_when_garbage_is_collected() -> None:
    [found] = plugins.find(ALL, ["id==scheduler"])
    assert found.exports == {
        "PauseThreshold": "0.02",
        "DeletionThreshold": "0",
        "MutationThreshold": "100",
        "ScheduleDelay": "500ms",
    }


def test_filters_on_plugins() -> None:
    assert plugins.find(ALL, []) == ALL
    assert {p.id for p in plugins.find(ALL, [f"type=={plugins.GRPC}"])} >= {"content", "tasks"}
    assert plugins.find(ALL, ["id==nothing"]) == []
    with pytest.raises(InvalidArgument):
        plugins.find(ALL, ["type="])


def test_what_a_plugin_requires_is_in_the_list() -> None:
    types = {plugin.type for plugin in ALL}
    assert {required for plugin in ALL for required in plugin.requires} <= types


async def test_the_epoch_grows_with_every_start(tmp_path: Path) -> None:
    for expected in (1, 2, 3):
        async with open_metadata(tmp_path) as meta:
            assert await meta.db.write(meta_rows.next_epoch) == expected
            first = await meta.db.write(
                lambda tx, n=expected: meta_rows.setdefault(tx, "k", f"{n}")
            )  # type: ignore[misc]
            assert first == "1"


async def test_metrics_show_what_is_recorded(tmp_path: Path) -> None:
    registry = Registry()
    metrics = ContainerdMetrics(registry)
    async with open_metadata(tmp_path) as meta:
        await meta.images.create("a", Image("x", Descriptor("t", "sha256:" + "a" * 64, 1)))
        await metrics.refresh(meta.db)
        metrics.observe_collection(
            Collection((Node("snapshots/overlayfs", "a", "k"),), 7, 0.1, 0.1)
        )
        metrics.observe_collection(None)
    with metrics.timed_transfer("pull"):
        pass
    with pytest.raises(ZeroDivisionError), metrics.timed_transfer("pull"):
        raise ZeroDivisionError
    page = registry.page().decode()
    for outcome in ("ok", "failed"):
        sample = f'transfer_seconds_count{{kind="pull",outcome="{outcome}"}} 1.0'
        assert f"theseus_containerd_{sample}" in page
    assert 'theseus_containerd_objects{kind="images"} 1.0' in page
    assert "theseus_containerd_journal_seq 1.0" in page
    assert 'theseus_containerd_gc_removed_total{kind="snapshots"} 1.0' in page
    assert "theseus_containerd_gc_freed_bytes_total 7.0" in page
    for outcome in ("ok", "failed"):
        assert f'theseus_containerd_gc_collections_total{{outcome="{outcome}"}} 1.0' in page


def test_pages_are_joined_by_family() -> None:
    first = b"# HELP a A.\n# TYPE a counter\na_total 1\n# HELP b B.\n# TYPE b gauge\nb 2\n"
    second = b'# HELP a A.\n# TYPE a counter\na_total{shim="x"} 3\n# TYPE c gauge\nc 4\n'
    assert join_pages(first, second).decode().splitlines() == [
        "# HELP a A.",
        "# TYPE a counter",
        "a_total 1",
        'a_total{shim="x"} 3',
        "# HELP b B.",
        "# TYPE b gauge",
        "b 2",
        "# TYPE c gauge",
        "c 4",
    ]
    assert join_pages(first, b"") == first
