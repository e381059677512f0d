"""Pulling: what ends up in the stores, what is told, and what a failure leaves."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

import pytest

from services.common.errors import (
    DataLoss,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from services.containerd.content.descriptor import Descriptor, Platform
from services.containerd.content.digest import chain_ids, digest_of
from services.containerd.content.store import CHUNK_BYTES
from services.containerd.images import media_types
from services.containerd.images.manifest import MalformedManifest
from services.containerd.images.reference import parse_reference
from services.containerd.remotes.remote import RegistryAccess
from services.containerd.transfer.destination import Destination, ExtraName, Unpacking
from services.containerd.transfer.progress import report_nothing
from tests.fakes.cli import until
from tests.fakes.images import Blobs, build_image, build_index, described
from tests.fakes.registry import FakeRegistry, Fault
from tests.fakes.transfer_node import TransferNode, open_transfer_node

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from services.containerd.images.store import Image
    from services.containerd.transfer.progress import Progress
    from tests.fakes.images import BuiltImage

AMD64, ARM64 = Platform("linux", "amd64"), Platform("linux", "arm64", "v8")


@pytest.fixture
async def registry() -> AsyncIterator[FakeRegistry]:
    async with FakeRegistry() as registry:
        yield registry


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[TransferNode]:
    async with open_transfer_node(tmp_path) as node:
        yield node


async def pull(
    node: TransferNode,
    name: str,
    destination: Destination | None = None,
    *,
    namespace: str = "a",
    reports: list[Progress] | None = None,
) -> list[Image]:
    reference = parse_reference(name)
    remote = node.registries.open(reference, RegistryAccess())
    told = [] if reports is None else reports
    return await node.transfers.pull(
        namespace, remote, destination or Destination(name=name), told.append
    )


def two_platforms(blobs: Blobs) -> tuple[Descriptor, BuiltImage, BuiltImage]:
    amd64 = build_image(blobs, [{"base": b"amd64"}, {"top": b"1"}], platform=AMD64)
    arm64 = build_image(blobs, [{"base": b"arm64"}], platform=ARM64)
    return build_index(blobs, [arm64.manifest, amd64.manifest]), amd64, arm64


async def test_pull_stores_everything_with_labels_that_keep_it(
    registry: FakeRegistry, node: TransferNode
) -> None:
    blobs = Blobs()
    image = build_image(blobs, [{"a": b"1"}, {"b": b"2"}])
    name = registry.serve("lib/x", "1", image.manifest, blobs)
    [stored] = await pull(node, name, Destination(name=name, labels={"k": "v"}))
    assert (stored.name, stored.target.digest) == (name, image.manifest.digest)
    assert (await node.meta.images.get("a", name)).labels == {"k": "v"}
    assert await node.digests() == set(blobs.data)
    labels = (await node.content.info("a", image.manifest.digest)).labels
    assert labels == {
        "containerd.io/gc.ref.content.config": image.config.digest,
        "containerd.io/gc.ref.content.l.0": image.layers[0].digest,
        "containerd.io/gc.ref.content.l.1": image.layers[1].digest,
        f"containerd.io/distribution.source.{registry.address}": "lib/x",
    }
    assert await node.content.statuses("a") == []
    assert await node.meta.leases.find("a") == []
    assert node.snapshotter.names() == set()


async def test_pull_takes_only_the_platforms_that_are_wanted(
    registry: FakeRegistry, node: TransferNode
) -> None:
    blobs = Blobs()
    index, amd64, arm64 = two_platforms(blobs)
    name = registry.serve("lib/x", "1", index, blobs)
    await pull(node, name, Destination(name=name, platforms=(AMD64,)))
    assert await node.digests() == {
        index.digest,
        amd64.manifest.digest,
        amd64.config.digest,
        *(layer.digest for layer in amd64.layers),
    }
    labels = (await node.content.info("a", index.digest)).labels
    assert labels["containerd.io/gc.ref.content.m.0"] == arm64.manifest.digest
    assert labels["containerd.io/gc.ref.content.m.1"] == amd64.manifest.digest


async def test_all_metadata_keeps_the_documents_of_other_platforms(
    registry: FakeRegistry, node: TransferNode
) -> None:
    blobs = Blobs()
    index, amd64, arm64 = two_platforms(blobs)
    name = registry.serve("lib/x", "1", index, blobs)
    destination = Destination(name=name, platforms=(ARM64,), all_metadata=True)
    await pull(node, name, destination)
    missing = set(blobs.data) - await node.digests()
    assert missing == {layer.digest for layer in amd64.layers}
    assert arm64.config.digest in await node.digests()


async def test_no_matching_platform_is_not_found_and_says_which_there_are(
    registry: FakeRegistry, node: TransferNode
) -> None:
    blobs = Blobs()
    name = registry.serve("lib/x", "1", two_platforms(blobs)[0], blobs)
    destination = Destination(name=name, platforms=(Platform("linux", "s390x"),))
    with pytest.raises(NotFound, match=r"linux/s390x; it has: linux/amd64, linux/arm64"):
        await pull(node, name, destination)
    with pytest.raises(NotFound):
        await node.meta.images.get("a", name)


async def test_manifest_limit_takes_the_best(registry: FakeRegistry, node: TransferNode) -> None:
    blobs = Blobs()
    index, amd64, arm64 = two_platforms(blobs)
    name = registry.serve("lib/x", "1", index, blobs)
    await pull(node, name, Destination(name=name, platforms=(ARM64, AMD64), manifest_limit=1))
    assert arm64.layers[0].digest in await node.digests()
    assert amd64.manifest.digest not in await node.digests()


async def test_unpack_makes_a_chain_of_snapshots(
    registry: FakeRegistry, node: TransferNode
) -> None:
    blobs = Blobs()
    index, amd64, _ = two_platforms(blobs)
    name = registry.serve("lib/x", "1", index, blobs)
    await pull(node, name, Destination(name=name, unpackings=(Unpacking(),)))
    lower, upper = chain_ids(amd64.diff_ids)
    assert node.snapshotter.names() == {lower, upper}
    top = await node.snapshotter.stat("a", upper)
    assert (top.parent, top.labels) == (lower, {"containerd.io/snapshot.ref": upper})
    assert {key.partition(" ")[2] for key in node.snapshotter.prepared} == {lower, upper}
    assert all(key.startswith("extract-") for key in node.snapshotter.prepared)
    config = await node.content.info("a", amd64.config.digest)
    assert config.labels["containerd.io/gc.ref.snapshot.memory"] == upper
    layer = await node.content.info("a", amd64.layers[0].digest)
    assert layer.labels["containerd.io/uncompressed"] == amd64.diff_ids[0]


def three_layers(registry: FakeRegistry) -> tuple[str, BuiltImage, Destination]:
    blobs = Blobs()
    image = build_image(blobs, [{"a": b"1"}, {"b": b"2"}, {"c": b"3"}])
    name = registry.serve("lib/x", "1", image.manifest, blobs)
    return name, image, Destination(name=name, unpackings=(Unpacking(),))


async def test_layers_are_unpacked_at_once_and_committed_from_the_lowest_up(
    registry: FakeRegistry, node: TransferNode
) -> None:
    name, image, destination = three_layers(registry)
    gate = node.applier.gates[image.layers[0].digest] = asyncio.Event()
    task = asyncio.ensure_future(pull(node, name, destination))
    await until(lambda: len(node.applier.applied) == 3)
    assert not any(key.startswith("sha256:") for key in node.snapshotter.names())
    gate.set()
    await task
    chain = chain_ids(image.diff_ids)
    assert node.snapshotter.names() == set(chain)
    parents = [(await node.snapshotter.stat("a", link)).parent for link in chain]
    assert parents == ["", *chain[:-1]]
    assert [node.applier.detached[layer.digest] for layer in image.layers] == [0, 1, 1]


async def test_a_layer_that_needs_those_below_is_unpacked_again_over_them(
    registry: FakeRegistry, node: TransferNode
) -> None:
    name, image, destination = three_layers(registry)
    gate = node.applier.gates[image.layers[0].digest] = asyncio.Event()
    needy = image.layers[1].digest
    node.applier.needs_lower.add(needy)
    task = asyncio.ensure_future(pull(node, name, destination))
    await until(lambda: len(node.applier.applied) == 3)
    gate.set()
    await task
    chain = chain_ids(image.diff_ids)
    assert node.snapshotter.names() == set(chain)
    assert (await node.snapshotter.stat("a", chain[1])).parent == chain[0]
    assert node.applier.applied[needy] == 2


async def test_a_snapshotter_that_cannot_move_a_snapshot_gets_one_layer_after_another(
    registry: FakeRegistry, node: TransferNode
) -> None:
    node.snapshotter.capabilities = ()
    name, image, destination = three_layers(registry)
    await pull(node, name, destination)
    assert node.snapshotter.names() == set(chain_ids(image.diff_ids))
    assert not any(node.applier.detached.values())


async def test_a_broken_layer_takes_those_above_it_along(
    registry: FakeRegistry, node: TransferNode
) -> None:
    name, image, destination = three_layers(registry)
    registry.faults.append(Fault("corrupt", image.layers[0].digest))
    with pytest.raises(DataLoss, match="wrong bytes"):
        await pull(node, name, destination)
    assert node.snapshotter.names() == set()


async def test_images_with_common_layers_are_unpacked_at_once(
    registry: FakeRegistry, node: TransferNode
) -> None:
    blobs = Blobs()
    common = [{"a": b"1"}, {"b": b"2"}]
    images = [build_image(blobs, [*common, {"c": bytes([n])}]) for n in range(4)]
    names = [registry.serve(f"lib/{n}", "1", i.manifest, blobs) for n, i in enumerate(images)]
    async with asyncio.timeout(20):
        await asyncio.gather(
            *(pull(node, name, Destination(name=name, unpackings=(Unpacking(),))) for name in names)
        )
    assert sorted(node.applier.applied.values()) == [1] * 6


async def test_a_second_image_unpacks_only_what_is_new(
    registry: FakeRegistry, node: TransferNode
) -> None:
    blobs = Blobs()
    one = build_image(blobs, [{"base": b"1"}, {"top": b"one"}])
    two = build_image(blobs, [{"base": b"1"}, {"top": b"two"}])
    first = registry.serve("lib/x", "1", one.manifest, blobs)
    second = registry.serve("lib/x", "2", two.manifest, blobs)
    for name in (first, second, second):
        await pull(node, name, Destination(name=name, unpackings=(Unpacking(),)))
    assert sorted(node.applier.applied.values()) == [1, 1, 1]


async def test_a_wrong_diff_id_is_data_loss_and_leaves_no_snapshot(
    registry: FakeRegistry, node: TransferNode
) -> None:
    blobs = Blobs()
    image = build_image(blobs, [{"a": b"1"}])
    config = blobs.add_json(
        {
            "os": "linux",
            "architecture": "amd64",
            "rootfs": {"type": "layers", "diff_ids": [digest_of(b"another layer")]},
        },
        media_types.OCI_CONFIG,
    )
    manifest = blobs.add_json(
        {
            "schemaVersion": 2,
            "mediaType": media_types.OCI_MANIFEST,
            "config": described(config),
            "layers": [described(image.layers[0])],
        },
        media_types.OCI_MANIFEST,
    )
    name = registry.serve("lib/x", "1", manifest, blobs)
    with pytest.raises(DataLoss, match="diff id"):
        await pull(node, name, Destination(name=name, unpackings=(Unpacking(),)))
    assert node.snapshotter.names() == set()
    with pytest.raises(NotFound):
        await node.meta.images.get("a", name)


async def test_a_failing_applier_leaves_no_snapshot_and_no_image(
    registry: FakeRegistry, node: TransferNode
) -> None:
    blobs = Blobs()
    name = registry.serve("lib/x", "1", build_image(blobs, [{"a": b"1"}]).manifest, blobs)
    node.applier.failure = DataLoss("the layer is broken")
    with pytest.raises(DataLoss, match="the layer is broken"):
        await pull(node, name, Destination(name=name, unpackings=(Unpacking(),)))
    assert node.snapshotter.names() == set()
    assert await node.meta.images.find("a") == []
    assert await node.meta.leases.find("a") == []


async def test_a_pull_that_is_cancelled_leaves_no_snapshot_and_is_gone_on_with(
    registry: FakeRegistry, node: TransferNode
) -> None:
    blobs = Blobs()
    name = registry.serve("lib/x", "1", build_image(blobs, [{"a": b"1"}]).manifest, blobs)
    destination = Destination(name=name, unpackings=(Unpacking(),))
    node.applier.gate = asyncio.Event()
    task = asyncio.ensure_future(pull(node, name, destination))
    await node.applier.begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert node.snapshotter.names() == set()
    [lease] = await node.meta.leases.find("a")
    assert lease.labels["theseus.io/pull"] == name
    node.applier.gate = None
    assert await pull(node, name, destination)
    assert len({seen.path for seen in registry.requests("GET", "/")}) == 3
    assert len(registry.requests("GET", "/")) == 3
    assert await node.meta.leases.find("a") == []


async def test_an_unknown_snapshotter_is_refused_before_anything_is_fetched(
    registry: FakeRegistry, node: TransferNode
) -> None:
    destination = Destination(name="x", unpackings=(Unpacking(snapshotter="zfs"),))
    with pytest.raises(InvalidArgument, match="'zfs' is not configured: there are memory"):
        await pull(node, f"{registry.address}/lib/x:1", destination)
    assert registry.seen == []


async def test_an_image_for_another_platform_is_stored_and_not_unpacked(
    registry: FakeRegistry, node: TransferNode
) -> None:
    blobs = Blobs()
    image = build_image(blobs, [{"a": b"1"}], platform=ARM64)
    name = registry.serve("lib/x", "1", image.manifest, blobs)
    await pull(node, name, Destination(name=name, unpackings=(Unpacking(),)))
    assert image.layers[0].digest in await node.digests()
    assert node.snapshotter.names() == set()


async def test_pulls_of_one_image_at_once_fetch_each_blob_once(
    registry: FakeRegistry, node: TransferNode
) -> None:
    blobs = Blobs()
    image = build_image(blobs, [{"a": b"1"}, {"b": b"2"}])
    name = registry.serve("lib/x", "1", image.manifest, blobs)
    destination = Destination(name=name, unpackings=(Unpacking(),))
    await asyncio.gather(
        *(pull(node, name, destination) for _ in range(3)),
        pull(node, name, destination, namespace="b"),
    )
    for digest in blobs.data:
        assert len(registry.requests("GET", digest)) == 1
    assert await node.digests("b") == set(blobs.data)
    assert node.snapshotter.names("b") == set(chain_ids(image.diff_ids))


async def test_pulls_into_two_namespaces_at_once_fetch_each_blob_once(
    registry: FakeRegistry, node: TransferNode
) -> None:
    blobs = Blobs()
    image = build_image(blobs, [{"a": b"1"}, {"b": b"2"}])
    name = registry.serve("lib/x", "1", image.manifest, blobs)
    await asyncio.gather(*(pull(node, name, namespace=namespace) for namespace in "ab"))
    for namespace in "ab":
        assert await node.digests(namespace) == set(blobs.data)
    paths = [seen.path for seen in registry.requests("GET", "/")]
    assert len(paths) == len(set(paths)) == 4


async def test_several_layers_are_fetched_at_once(
    registry: FakeRegistry, node: TransferNode
) -> None:
    blobs = Blobs()
    image = build_image(blobs, [{f"f{n}": bytes([n])} for n in range(6)])
    name = registry.serve("lib/x", "1", image.manifest, blobs)
    await pull(node, name)  # the documents are there now
    for layer in image.layers:
        await node.content.delete("a", layer.digest)
    registry.gate = asyncio.Event()
    registry.seen.clear()
    task = asyncio.ensure_future(pull(node, name))
    while len(registry.requests("GET", "/blobs/")) < 4:
        registry.arrived.clear()
        await registry.arrived.wait()
    registry.gate.set()
    await task
    assert await node.digests() == set(blobs.data)


async def test_a_damaged_rest_of_an_earlier_pull_is_fetched_anew(
    registry: FakeRegistry, node: TransferNode
) -> None:
    blobs = Blobs()
    image = build_image(blobs, [{"a": b"1" * 1000}])
    name = registry.serve("lib/x", "1", image.manifest, blobs)
    layer = image.layers[0]
    async with await node.content.writer("a", f"layer-{layer.digest}") as writer:
        await writer.write(b"damaged")
    await pull(node, name)
    assert await node.content.read("a", layer.digest) == blobs.data[layer.digest]


async def test_wrong_bytes_from_the_registry_are_data_loss_and_not_kept(
    registry: FakeRegistry, node: TransferNode
) -> None:
    blobs = Blobs()
    image = build_image(blobs, [{"a": b"1"}])
    name = registry.serve("lib/x", "1", image.manifest, blobs)
    registry.faults.append(Fault("corrupt", image.layers[0].digest))
    with pytest.raises(DataLoss, match="wrong bytes"):
        await pull(node, name)
    assert image.layers[0].digest not in await node.digests()
    assert await node.content.statuses("a") == []
    assert await pull(node, name)


async def arrived(node: TransferNode, whole: Descriptor, part: Descriptor, size: int) -> None:
    """Wait until one blob is there, and ``size`` of another one but for what is in memory."""
    async with asyncio.timeout(10):
        while True:
            offsets = {status.expected: status for status in await node.content.statuses("a")}
            on_its_way = offsets.get(part.digest)
            is_there = on_its_way is not None and on_its_way.offset_bytes > size - CHUNK_BYTES
            if is_there and whole.digest in await node.digests():
                return
            await asyncio.sleep(0.01)


async def test_a_pull_that_fails_for_good_takes_what_others_had_begun(
    registry: FakeRegistry, node: TransferNode
) -> None:
    blobs = Blobs()
    noise = [random.Random(seed).randbytes(3 << 20) for seed in range(2)]
    image = build_image(blobs, [{"a": noise[0]}, {"b": noise[1]}])
    name = registry.serve("lib/x", "1", image.manifest, blobs)
    registry.faults.append(Fault("stall", image.layers[1].digest, after_bytes=2 << 20))
    task = asyncio.ensure_future(pull(node, name))
    await arrived(node, image.layers[0], image.layers[1], 2 << 20)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    [left] = await node.content.statuses("a")
    assert left.offset_bytes == 2 << 20  # what was in memory was flushed
    # The next attempt finds that the image is broken: what it went on from goes too.
    node.applier.failure = DataLoss("the layer is broken")
    with pytest.raises(DataLoss):
        await pull(node, name, Destination(name=name, unpackings=(Unpacking(),)))
    assert await node.content.statuses("a") == []
    assert await node.meta.leases.find("a") == []


async def test_a_full_disk_takes_what_all_interrupted_pulls_have_left(
    registry: FakeRegistry, node: TransferNode
) -> None:
    blobs = Blobs()
    names = []
    for number in range(3):
        image = build_image(blobs, [{"a": bytes([number])}])
        names.append(registry.serve(f"lib/{number}", "1", image.manifest, blobs))
    node.applier.failure = Unavailable("interrupted")
    destinations = [Destination(name=name, unpackings=(Unpacking(),)) for name in names]
    for destination in destinations[:2]:
        with pytest.raises(Unavailable):
            await pull(node, destination.name, destination)
    assert len(await node.meta.leases.find("a")) == 2
    node.applier.failure = ResourceExhausted("the disk is full")
    with pytest.raises(ResourceExhausted):
        await pull(node, destinations[2].name, destinations[2])
    assert await node.meta.leases.find("a") == []


@pytest.mark.parametrize("how", ["cut", "cancelled", "registry away"])
async def test_an_interrupted_pull_is_gone_on_with_where_it_was(
    how: str, registry: FakeRegistry, node: TransferNode
) -> None:
    blobs = Blobs()
    noise = [random.Random(seed).randbytes(8 << 20) for seed in range(2)]
    image = build_image(blobs, [{"a": noise[0]}, {"b": noise[1]}])
    name = registry.serve("lib/x", "1", image.manifest, blobs)
    first, second = image.layers
    half = 4 << 20
    if how == "cut":
        registry.faults.append(Fault("truncate", second.digest, after_bytes=half))
    else:
        registry.faults.append(Fault("stall", second.digest, after_bytes=half))
        if how == "registry away":
            registry.faults.append(Fault("status", second.digest, times=9, status=503))
        task = asyncio.ensure_future(pull(node, name))
        async with asyncio.timeout(20):
            await arrived(node, first, second, half)
            if how == "cancelled":
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            else:
                with pytest.raises(Unavailable):
                    await task
        registry.faults.clear()
    await pull(node, name)
    assert await node.digests() == set(blobs.data)
    whole = sum(map(len, blobs.data.values()))
    assert whole <= registry.sent_bytes <= 1.1 * whole
    assert await node.meta.leases.find("a") == []


async def test_progress_is_told_in_the_words_that_clients_know(
    registry: FakeRegistry, node: TransferNode
) -> None:
    blobs = Blobs()
    image = build_image(blobs, [{"a": b"1"}])
    name = registry.serve("lib/x", "1", image.manifest, blobs)
    reports: list[Progress] = []
    await pull(node, name, Destination(name=name, unpackings=(Unpacking(),)), reports=reports)
    assert [report.event for report in reports[:3]] == [
        f"Resolving from OCI Registry ({name})",
        f"Pulling from OCI Registry ({name})",
        "fetching image content",
    ]
    assert [report.event for report in reports[-2:]] == [
        "saved",
        f"Completed pull from OCI Registry ({name})",
    ]
    layer = f"layer-{image.layers[0].digest}"
    about = [report for report in reports if report.name == layer]
    assert [report.event for report in about] == ["waiting", "complete", "extracting", "extracted"]
    assert about[0].parents == (f"manifest-{image.manifest.digest}",)
    assert about[1].progress == about[1].total == image.layers[0].size_bytes
    manifest = next(r for r in reports if r.name == f"manifest-{image.manifest.digest}")
    assert manifest.parents == (name,)
    again: list[Progress] = []
    await pull(node, name, reports=again)
    assert [r.event for r in again if r.name == layer] == ["waiting", "already exists"]


async def test_a_pull_needs_a_name_to_store_under(
    registry: FakeRegistry, node: TransferNode
) -> None:
    blobs = Blobs()
    name = registry.serve("lib/x", "1", build_image(blobs, [{"a": b"1"}]).manifest, blobs)
    with pytest.raises(NotFound, match="name"):
        await pull(node, name, Destination())


async def test_extra_names_go_with_the_image(registry: FakeRegistry, node: TransferNode) -> None:
    blobs = Blobs()
    image = build_image(blobs, [{"a": b"1"}])
    name = registry.serve("lib/x", "1", image.manifest, blobs)
    extra = (ExtraName("r.example/x:2"), ExtraName("r.example/x", is_prefix=True, add_digest=True))
    await pull(node, name, Destination(name=name, extra_names=extra))
    stored = {image.name: image for image in await node.meta.images.find("a")}
    by_digest = f"r.example/x@{image.manifest.digest}"
    assert set(stored) == {name, "r.example/x:2", by_digest}
    assert stored[by_digest].labels["containerd.io/gc.bref.image"] == name
    assert "containerd.io/gc.expire" in stored[by_digest].labels


async def test_an_index_in_an_index_is_followed(registry: FakeRegistry, node: TransferNode) -> None:
    blobs = Blobs()
    index, _, _ = two_platforms(blobs)
    name = registry.serve("lib/x", "1", build_index(blobs, [index]), blobs)
    await pull(node, name, Destination(name=name, platforms=(AMD64,), unpackings=(Unpacking(),)))
    assert len(node.snapshotter.names()) == 2


async def test_indexes_that_are_nested_too_deep_are_refused(
    registry: FakeRegistry, node: TransferNode
) -> None:
    blobs = Blobs()
    index = two_platforms(blobs)[0]
    for _ in range(6):
        index = build_index(blobs, [index])
    name = registry.serve("lib/x", "1", index, blobs)
    with pytest.raises(MalformedManifest, match="lies inside"):
        await pull(node, name)


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (501, "501 layers, and no more than 500"),
        (10_000, "10000 layers"),
        (10_001, "10001 entries"),
    ],
)
async def test_an_image_of_too_many_layers_is_refused_before_any_is_fetched(
    count: int, words: str, registry: FakeRegistry, node: TransferNode
) -> None:
    blobs = Blobs()
    image = build_image(blobs, [{"a": b"1"}])
    config = blobs.add_json(
        {
            "os": "linux",
            "architecture": "amd64",
            "rootfs": {"type": "layers", "diff_ids": list(image.diff_ids) * count},
        },
        media_types.OCI_CONFIG,
    )
    manifest = blobs.add_json(
        {
            "schemaVersion": 2,
            "mediaType": media_types.OCI_MANIFEST,
            "config": described(config),
            "layers": [described(image.layers[0])] * count,
        },
        media_types.OCI_MANIFEST,
    )
    name = registry.serve("lib/x", "1", manifest, blobs)
    with pytest.raises(InvalidArgument, match=words):
        await pull(node, name, Destination(name=name, unpackings=(Unpacking(),)))
    assert not registry.requests("GET", image.layers[0].digest)
    assert await node.meta.leases.find("a") == []


async def test_layers_and_diff_ids_have_to_be_as_many(
    registry: FakeRegistry, node: TransferNode
) -> None:
    blobs = Blobs()
    image = build_image(blobs, [{"a": b"1"}])
    manifest = blobs.add_json(
        {
            "schemaVersion": 2,
            "mediaType": media_types.OCI_MANIFEST,
            "config": described(image.config),
            "layers": [described(image.layers[0])] * 2,
        },
        media_types.OCI_MANIFEST,
    )
    name = registry.serve("lib/x", "1", manifest, blobs)
    with pytest.raises(MalformedManifest, match="2 layers"):
        await pull(node, name)


async def test_push_then_pull_gives_the_same_image(
    registry: FakeRegistry, node: TransferNode
) -> None:
    blobs = Blobs()
    index = two_platforms(blobs)[0]
    name = registry.serve("lib/x", "1", index, blobs)
    await pull(node, name)
    async with FakeRegistry() as other:
        target = parse_reference(f"{other.address}/new/y:2")
        reports: list[Progress] = []
        remote = node.registries.open(target, RegistryAccess())
        await node.transfers.push("a", name, remote, reports.append)
        assert other.manifests["new/y", "2"][0] == blobs.data[index.digest]
        events = [report.event for report in reports]
        assert events[0] == f"Pushing to OCI Registry ({target})"
        assert events.count("complete") == len(blobs.data)
        [again] = await pull(node, str(target), namespace="c")
        assert again.target.digest == index.digest
        assert await node.digests("c") == set(blobs.data)
        uploads = len(other.requests("PUT", "/blobs/"))
        await node.transfers.push("a", name, remote, reports.append)
        assert len(other.requests("PUT", "/blobs/")) == uploads


async def test_several_layers_are_pushed_at_once(
    registry: FakeRegistry, node: TransferNode
) -> None:
    blobs = Blobs()
    image = build_image(blobs, [{f"f{n}": bytes([n])} for n in range(6)])
    name = registry.serve("lib/x", "1", image.manifest, blobs)
    await pull(node, name)
    async with FakeRegistry() as other:
        other.gate = asyncio.Event()
        target = parse_reference(f"{other.address}/new/y:2")
        remote = node.registries.open(target, RegistryAccess())
        task = asyncio.ensure_future(node.transfers.push("a", name, remote, report_nothing))
        async with asyncio.timeout(10):
            while len(other.requests("HEAD", "/blobs/")) < 4:
                other.arrived.clear()
                await other.arrived.wait()
            assert not other.requests("PUT", "/manifests/")
            other.gate.set()
            await task
        assert other.blobs.keys() == blobs.data.keys() - {image.manifest.digest}
        assert other.seen[-1].method == "PUT"  # what refers to others comes last
        assert other.seen[-1].path.endswith("/manifests/2")


async def test_push_of_one_platform_leaves_the_index_out(
    registry: FakeRegistry, node: TransferNode
) -> None:
    blobs = Blobs()
    index, amd64, _ = two_platforms(blobs)
    name = registry.serve("lib/x", "1", index, blobs)
    await pull(node, name, Destination(name=name, platforms=(AMD64,)))
    remote = node.registries.open(parse_reference(f"{registry.address}/new/y:2"), RegistryAccess())
    await node.transfers.push("a", name, remote, report_nothing, platforms=(AMD64,))
    assert digest_of(registry.manifests["new/y", "2"][0]) == amd64.manifest.digest
    with pytest.raises(NotFound):
        await node.transfers.push("a", name, remote, report_nothing)


async def test_tag_gives_a_further_name(registry: FakeRegistry, node: TransferNode) -> None:
    blobs = Blobs()
    image = build_image(blobs, [{"a": b"1"}])
    name = registry.serve("lib/x", "1", image.manifest, blobs)
    await pull(node, name)
    await node.transfers.tag("a", name, Destination(name="r.example/other:1"))
    tagged = await node.meta.images.get("a", "r.example/other:1")
    assert tagged.target.digest == image.manifest.digest
    with pytest.raises(NotFound):
        await node.transfers.tag("a", "nothing", Destination(name="x"))
