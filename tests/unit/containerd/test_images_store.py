"""Names of images: creation, masks, filters, validation, deletion and events."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from services.common.errors import AlreadyExists, InvalidArgument, NotFound
from services.containerd.content.descriptor import Descriptor
from services.containerd.images.store import Image
from services.containerd.leases.lease import EXPIRE_LABEL, Resource, current_lease
from tests.fakes.metadata import Metadata, open_metadata

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

NS = "test"
TARGET = Descriptor(
    media_type="application/vnd.oci.image.manifest.v1+json",
    digest="sha256:" + "a" * 64,
    size_bytes=7,
    annotations={"org": "x"},
)
OTHER = replace(TARGET, digest="sha256:" + "b" * 64, annotations={})
IMAGE = Image("docker.io/library/busybox:latest", TARGET, {"a": "1", "b": "2"})


@pytest.fixture
async def meta(tmp_path: Path) -> AsyncIterator[Metadata]:
    async with open_metadata(tmp_path) as opened:
        yield opened


async def test_what_was_created_is_what_get_returns(meta: Metadata) -> None:
    created = await meta.images.create(NS, IMAGE)
    assert created.created_at_ns == created.updated_at_ns > 0
    assert await meta.images.get(NS, IMAGE.name) == created
    [(namespace, topic, event)] = await meta.events()
    assert (namespace, topic) == (NS, "/images/create")
    assert event is not None
    assert (event.name, dict(event.labels)) == (IMAGE.name, {"a": "1", "b": "2"})


async def test_a_time_from_the_client_is_kept(meta: Metadata) -> None:
    created = await meta.images.create(NS, replace(IMAGE, created_at_ns=5))
    assert (created.created_at_ns, created.updated_at_ns) == (5, 5)
    updated = await meta.images.update(NS, replace(IMAGE, updated_at_ns=9))
    assert (updated.created_at_ns, updated.updated_at_ns) == (5, 9)


async def test_a_taken_name_is_refused_in_its_namespace_only(meta: Metadata) -> None:
    await meta.images.create(NS, IMAGE)
    with pytest.raises(AlreadyExists):
        await meta.images.create(NS, IMAGE)
    await meta.images.create("other", IMAGE)


@pytest.mark.parametrize(
    ("image", "field"),
    [
        (replace(IMAGE, name=""), "image.name"),
        (replace(IMAGE, target=replace(TARGET, digest="")), "image.target.digest"),
        (replace(IMAGE, target=replace(TARGET, digest="sha256:x")), "image.target.digest"),
        (replace(IMAGE, target=replace(TARGET, size_bytes=0)), "image.target.size"),
        (replace(IMAGE, target=replace(TARGET, media_type="")), "image.target.media_type"),
        (replace(IMAGE, labels={"k": "v" * 4096}), "labels"),
    ],
)
async def test_create_and_update_refuse(meta: Metadata, image: Image, field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await meta.images.create(NS, image)
    assert caught.value.field == field
    created = await meta.images.create(NS, IMAGE)
    with pytest.raises(InvalidArgument):
        await meta.images.update(NS, image)
    assert await meta.images.find(NS) == [created]


async def test_update_by_mask(meta: Metadata) -> None:
    await meta.images.create(NS, IMAGE)
    new = Image(IMAGE.name, replace(OTHER, annotations={"n": "m"}), {"a": "9"})
    updated = await meta.images.update(NS, new, ["labels.a", "labels.b"])
    assert (updated.labels, updated.target) == ({"a": "9"}, TARGET)
    updated = await meta.images.update(NS, new, ["annotations.n"])
    assert updated.target == replace(TARGET, annotations={"org": "x", "n": "m"})
    updated = await meta.images.update(NS, new, ["target"])
    assert updated.target == new.target
    updated = await meta.images.update(NS, replace(new, target=OTHER), ["annotations"])
    assert updated.target == OTHER
    for path in ("name", "target.digest", "created_at"):
        with pytest.raises(InvalidArgument, match="cannot be changed"):
            await meta.images.update(NS, new, [path])


async def test_update_of_none_is_not_found(meta: Metadata) -> None:
    with pytest.raises(NotFound):
        await meta.images.update(NS, IMAGE)
    with pytest.raises(InvalidArgument):
        await meta.images.update(NS, replace(IMAGE, name=""))


async def test_put_creates_or_moves_and_keeps_other_labels(meta: Metadata) -> None:
    first = await meta.images.put(NS, IMAGE)
    second = await meta.images.put(NS, Image(IMAGE.name, OTHER, {"b": "3", "c": "4"}))
    assert second.target == OTHER
    assert second.labels == {"a": "1", "b": "3", "c": "4"}
    assert second.created_at_ns == first.created_at_ns
    assert await meta.topics() == ["/images/create", "/images/update"]


async def test_delete_of_another_target_is_not_found(meta: Metadata) -> None:
    await meta.images.create(NS, IMAGE)
    with pytest.raises(NotFound, match="has target"):
        await meta.images.delete(NS, IMAGE.name, target_digest=OTHER.digest)
    await meta.images.delete(NS, IMAGE.name, target_digest=TARGET.digest)
    with pytest.raises(NotFound):
        await meta.images.get(NS, IMAGE.name)
    assert await meta.topics() == ["/images/create", "/images/delete"]


async def test_only_a_synchronous_delete_waits_for_the_collection(meta: Metadata) -> None:
    await meta.images.create(NS, IMAGE)
    await meta.images.delete(NS, IMAGE.name)
    assert (meta.mutations.deletions, len(meta.collections)) == (1, 0)
    await meta.images.create(NS, IMAGE)
    await meta.images.delete(NS, IMAGE.name, sync=True)
    assert len(meta.collections) == 1


async def test_an_image_that_expires_joins_the_current_lease(meta: Metadata) -> None:
    lease = await meta.leases.create(NS)
    token = current_lease.set(lease.id)
    try:
        await meta.images.create(NS, IMAGE)
        await meta.images.create(
            NS, replace(IMAGE, name="brief", labels={EXPIRE_LABEL: "2030-01-01T00:00:00Z"})
        )
    finally:
        current_lease.reset(token)
    assert await meta.leases.resources(NS, lease.id) == [Resource("images", "brief")]
    await meta.images.delete(NS, "brief")
    assert await meta.leases.resources(NS, lease.id) == []


async def test_find_filters(meta: Metadata) -> None:
    await meta.images.create(NS, IMAGE)
    await meta.images.create(NS, Image("app", OTHER))
    await meta.images.create("other", Image("x", OTHER))

    async def names(*filters: str) -> list[str]:
        return [image.name for image in await meta.images.find(NS, filters)]

    assert await names() == ["app", IMAGE.name]
    assert await names("name==app") == ["app"]
    assert await names(f"target.digest=={TARGET.digest}") == [IMAGE.name]
    assert await names("target.mediatype~=manifest") == ["app", IMAGE.name]
    assert await names("target") == []
    assert await names("labels.a==1") == [IMAGE.name]
    assert await names("annotations.org") == [IMAGE.name]
