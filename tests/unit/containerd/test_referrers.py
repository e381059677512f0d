"""Artifacts that refer to images: listed, pulled along, pushed, by API and by tag."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from services.common.errors import NotFound
from services.containerd.content.digest import digest_of
from services.containerd.images import media_types
from services.containerd.images.manifest import MalformedManifest
from services.containerd.images.reference import parse_reference
from services.containerd.images.store import Image
from services.containerd.remotes.remote import RegistryAccess
from services.containerd.transfer.destination import Destination
from services.containerd.transfer.progress import report_nothing
from tests.fakes.images import Blobs, build_image, described
from tests.fakes.registry import FakeRegistry, Fault
from tests.fakes.transfer_node import TransferNode, open_transfer_node

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from services.containerd.content.descriptor import Descriptor
    from services.containerd.remotes.mirrors import MirroredRepository

SIGNATURE, BILL = "application/x.signature", "application/x.bill"
EMPTY = "application/vnd.oci.empty.v1+json"


@pytest.fixture(params=[True, False], ids=["api", "tag"])
async def registry(request: pytest.FixtureRequest) -> AsyncIterator[FakeRegistry]:
    async with FakeRegistry(referrers_api=request.param) as registry:
        yield registry


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[TransferNode]:
    async with open_transfer_node(tmp_path) as node:
        yield node


def artifact(blobs: Blobs, subject: Descriptor | None, kind: str, text: bytes) -> Descriptor:
    """An artifact of one blob, as OCI 1.1 has it."""
    document = {
        "schemaVersion": 2,
        "mediaType": media_types.OCI_MANIFEST,
        "artifactType": kind,
        "config": described(blobs.add(b"{}", EMPTY)),
        "layers": [described(blobs.add(text, kind))],
        "annotations": {"made": "for the test"},
    }
    if subject is not None:
        document["subject"] = described(subject)
    return blobs.add_json(document, media_types.OCI_MANIFEST)


def opened(node: TransferNode, registry: FakeRegistry, name: str = "lib/x:1") -> MirroredRepository:
    reference = parse_reference(f"{registry.address}/{name}")
    return node.registries.open(reference, RegistryAccess())


async def stored(node: TransferNode, blobs: Blobs) -> None:
    for digest, data in blobs.data.items():
        if digest not in await node.digests():
            async with await node.content.writer("a", digest, expected=digest) as writer:
                await writer.write(data)
                await writer.commit()


async def pushed(node: TransferNode, remote: MirroredRepository, *targets: Descriptor) -> None:
    """Push each by its digest, with what is in it."""
    for target in targets:
        image = await node.meta.images.put("a", Image("pushed", target))
        await node.transfers.push("a", image.name, remote, report_nothing)


async def test_artifacts_are_pushed_listed_and_pulled_along(
    registry: FakeRegistry, node: TransferNode, tmp_path: Path
) -> None:
    blobs = Blobs()
    image = build_image(blobs, [{"a": b"1"}])
    signature = artifact(blobs, image.manifest, SIGNATURE, b"signed")
    bill = artifact(blobs, image.manifest, BILL, b"contents")
    await stored(node, blobs)
    await pushed(node, opened(node, registry), image.manifest)
    by_digest = [opened(node, registry, f"lib/x@{each.digest}") for each in (signature, bill)]
    await pushed(node, by_digest[0], signature)
    await pushed(node, by_digest[1], bill)
    await pushed(node, by_digest[1], bill)  # once more is no more
    remote = opened(node, registry)
    found = await remote.referrers(image.manifest.digest)
    assert {(each.digest, each.artifact_type) for each in found} == {
        (signature.digest, SIGNATURE),
        (bill.digest, BILL),
    }
    tag = image.manifest.digest.replace(":", "-")
    assert (("lib/x", tag) in registry.manifests) is not registry.referrers_api

    (tmp_path / "other").mkdir()
    async with open_transfer_node(tmp_path / "other") as other:
        name = f"{registry.address}/lib/x:1"
        await other.transfers.pull(
            "a", opened(other, registry), Destination(name=name), report_nothing
        )
        assert signature.digest not in await other.digests()
        await other.transfers.pull(
            "a", opened(other, registry), Destination(name=name, all_metadata=True), report_nothing
        )
        assert await other.digests() == set(blobs.data)
        labels = (await other.content.info("a", image.manifest.digest)).labels
        kept = {value for key, value in labels.items() if ".referrer.sha256." in key}
        assert kept == {signature.digest, bill.digest}
        below = (await other.content.info("a", bill.digest)).labels
        assert digest_of(b"contents") in below.values()


async def test_an_image_without_referrers_is_pulled_as_ever(
    registry: FakeRegistry, node: TransferNode
) -> None:
    blobs = Blobs()
    name = registry.serve("lib/x", "1", build_image(blobs, [{"a": b"1"}]).manifest, blobs)
    destination = Destination(name=name, all_metadata=True)
    await node.transfers.pull("a", opened(node, registry), destination, report_nothing)
    assert await node.digests() == set(blobs.data)


async def test_an_artifact_is_stored_by_its_own_name(
    registry: FakeRegistry, node: TransferNode
) -> None:
    blobs = Blobs()
    target = artifact(blobs, None, BILL, b"contents")
    name = registry.serve("lib/x", "1", target, blobs)
    await node.transfers.pull("a", opened(node, registry), Destination(name=name), report_nothing)
    assert await node.digests() == set(blobs.data)
    assert node.snapshotter.names() == set()


async def test_what_does_not_refer_to_the_image_is_passed_over(node: TransferNode) -> None:
    async with FakeRegistry(referrers_api=False) as registry:
        blobs = Blobs()
        image = build_image(blobs, [{"a": b"1"}])
        name = registry.serve("lib/x", "1", image.manifest, blobs)
        others = Blobs()
        liar = artifact(others, None, BILL, b"contents")
        index = others.add_json(
            {"schemaVersion": 2, "manifests": [described(liar), described(image.layers[0])]},
            media_types.OCI_INDEX,
        )
        registry.blobs.update(others.data)
        registry.put_manifest("lib/x", "l", others.data[liar.digest], media_types.OCI_MANIFEST)
        tag = image.manifest.digest.replace(":", "-")
        registry.put_manifest("lib/x", tag, others.data[index.digest], media_types.OCI_INDEX)
        destination = Destination(name=name, all_metadata=True)
        await node.transfers.pull("a", opened(node, registry), destination, report_nothing)
        labels = (await node.content.info("a", image.manifest.digest)).labels
        assert not any("referrer" in key for key in labels)


async def test_a_list_that_does_not_parse_fails_the_pull_and_leaves_nothing(
    node: TransferNode,
) -> None:
    async with FakeRegistry(referrers_api=False) as registry:
        blobs = Blobs()
        image = build_image(blobs, [{"a": b"1"}])
        name = registry.serve("lib/x", "1", image.manifest, blobs)
        tag = image.manifest.digest.replace(":", "-")
        registry.put_manifest("lib/x", tag, b"[]", media_types.OCI_INDEX)
        destination = Destination(name=name, all_metadata=True)
        with pytest.raises(MalformedManifest):
            await node.transfers.pull("a", opened(node, registry), destination, report_nothing)
        with pytest.raises(NotFound):
            await node.meta.images.get("a", name)
        assert await node.meta.leases.find("a") == []


async def test_pages_are_followed_at_the_same_host_only(node: TransferNode) -> None:
    async with FakeRegistry() as registry:
        blobs = Blobs()
        image = build_image(blobs, [{"a": b"1"}])
        artifacts = [artifact(blobs, image.manifest, BILL, bytes([n])) for n in range(5)]
        registry.serve("lib/x", "1", image.manifest, blobs)
        found = await opened(node, registry).referrers(image.manifest.digest)
        assert {each.digest for each in found} == {each.digest for each in artifacts}
        registry.faults.append(Fault("html", "/referrers/"))
        assert await opened(node, registry).referrers(image.manifest.digest) == ()
