"""Container records: creation, masks, filters, validation and events, by upstream's rules."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from services.common.errors import AlreadyExists, InvalidArgument, NotFound
from services.containerd.containers.store import Container
from services.containerd.typed import TypedValue
from tests.fakes.metadata import Metadata, open_metadata

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

NS = "test"
SPEC = TypedValue("types.containerd.io/opencontainers/runtime-spec/1/Spec", b"{}")
CONTAINER = Container(
    id="web-1",
    runtime_name="io.containerd.runc.v2",
    runtime_options=TypedValue("containerd.runc.v1.Options", b"\x0a\x01x"),
    spec=SPEC,
    image="docker.io/library/busybox:latest",
    snapshotter="overlayfs",
    snapshot_key="web-1",
    labels={"a": "1", "b": "2"},
    extensions={"ext": TypedValue("some.Type", b"\x00\xff")},
    sandbox="pod",
)


@pytest.fixture
async def meta(tmp_path: Path) -> AsyncIterator[Metadata]:
    async with open_metadata(tmp_path) as opened:
        yield opened


async def test_what_was_created_is_what_get_returns(meta: Metadata) -> None:
    created = await meta.containers.create(NS, CONTAINER)
    assert created.created_at_ns == created.updated_at_ns > 0
    assert await meta.containers.get(NS, "web-1") == created
    times = {"created_at_ns": 0, "updated_at_ns": 0}
    assert replace(created, **times) == CONTAINER


async def test_create_tells_with_the_runtime(meta: Metadata) -> None:
    await meta.containers.create(NS, CONTAINER)
    [(namespace, topic, event)] = await meta.events()
    assert (namespace, topic) == (NS, "/containers/create")
    assert event is not None
    assert (event.id, event.image) == ("web-1", CONTAINER.image)
    assert event.runtime.name == "io.containerd.runc.v2"
    assert event.runtime.options.type_url == "containerd.runc.v1.Options"
    assert event.runtime.options.value == b"\x0a\x01x"


async def test_a_taken_id_is_refused_and_leaves_no_event(meta: Metadata) -> None:
    await meta.containers.create(NS, CONTAINER)
    with pytest.raises(AlreadyExists, match="'web-1' exists already"):
        await meta.containers.create(NS, CONTAINER)
    assert await meta.topics() == ["/containers/create"]
    await meta.containers.create("other", CONTAINER)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"id": ""}, "container.id"),
        ({"id": "../etc"}, "container.id"),
        ({"id": "a" * 77}, "container.id"),
        ({"id": "-a"}, "container.id"),
        ({"id": "a..b"}, "container.id"),
        ({"runtime_name": ""}, "container.runtime.name"),
        ({"spec": None}, "container.spec"),
        ({"snapshotter": ""}, "container.snapshotter"),
        ({"extensions": {"": SPEC}}, "container.extensions"),
        ({"labels": {"k" * 96: "v" * 4001}}, "labels"),
    ],
)
async def test_create_refuses(meta: Metadata, change: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await meta.containers.create(NS, replace(CONTAINER, **change))  # type: ignore[arg-type]
    assert caught.value.field == field
    assert await meta.containers.find(NS) == []
    assert await meta.events() == []


async def test_the_longest_id_and_label_are_taken(meta: Metadata) -> None:
    longest = replace(CONTAINER, id="a" * 76, labels={"k" * 96: "v" * 4000})
    assert (await meta.containers.create(NS, longest)).labels == longest.labels


async def test_update_by_mask_changes_only_what_it_names(meta: Metadata) -> None:
    await meta.containers.create(NS, CONTAINER)
    other = Container(
        id="web-1", labels={"a": "9", "c": "3"}, image="other", snapshot_key="k2", spec=SPEC
    )
    updated = await meta.containers.update(NS, other, ["labels.a", "labels.b", "image"])
    assert updated.labels == {"a": "9"}  # b is not there in the new values: it goes
    assert updated.image == "other"
    assert updated.snapshot_key == "web-1"
    assert updated.extensions == CONTAINER.extensions
    assert updated.updated_at_ns > updated.created_at_ns
    assert await meta.containers.get(NS, "web-1") == updated


async def test_update_of_extensions_by_name(meta: Metadata) -> None:
    await meta.containers.create(NS, CONTAINER)
    new = replace(CONTAINER, extensions={"new": TypedValue("t", b"1")})
    updated = await meta.containers.update(NS, new, ["extensions.new", "extensions.ext"])
    assert updated.extensions == {"new": TypedValue("t", b"1")}


async def test_update_without_a_mask_replaces_what_may_change(meta: Metadata) -> None:
    await meta.containers.create(NS, CONTAINER)
    new = replace(CONTAINER, labels={}, image="", snapshot_key="k2", extensions={})
    updated = await meta.containers.update(NS, new)
    assert (updated.labels, updated.image, updated.snapshot_key) == ({}, "", "k2")
    assert updated.sandbox == "pod"
    events = await meta.events()
    assert [topic for _, topic, _ in events] == ["/containers/create", "/containers/update"]
    assert events[1][2] is not None
    assert events[1][2].snapshot_key == "k2"


@pytest.mark.parametrize(
    ("change", "fields"),
    [
        ({"runtime_name": "other"}, []),
        ({"snapshotter": "native"}, []),
        ({}, ["runtime"]),
        ({}, ["id"]),
        ({"spec": None}, ["spec"]),
        ({"id": ""}, ["image"]),
    ],
)
async def test_update_refuses(meta: Metadata, change: dict[str, object], fields: list[str]) -> None:
    created = await meta.containers.create(NS, CONTAINER)
    with pytest.raises(InvalidArgument):
        await meta.containers.update(NS, replace(CONTAINER, **change), fields)  # type: ignore[arg-type]
    assert await meta.containers.get(NS, "web-1") == created


async def test_delete_asks_for_a_collection_and_tells(meta: Metadata) -> None:
    await meta.containers.create(NS, CONTAINER)
    before = meta.mutations.deletions
    await meta.containers.delete(NS, "web-1")
    assert meta.mutations.deletions > before
    assert await meta.topics() == ["/containers/create", "/containers/delete"]
    for call in (
        meta.containers.get(NS, "web-1"),
        meta.containers.delete(NS, "web-1"),
        meta.containers.update(NS, CONTAINER),
    ):
        with pytest.raises(NotFound, match="container 'web-1' does not exist"):
            await call


async def test_find_filters_and_sees_its_namespace_only(meta: Metadata) -> None:
    await meta.containers.create(NS, CONTAINER)
    await meta.containers.create(NS, replace(CONTAINER, id="db", labels={"a": "2"}, image=""))
    await meta.containers.create("other", replace(CONTAINER, id="x"))

    async def ids(*filters: str) -> list[str]:
        return [container.id for container in await meta.containers.find(NS, filters)]

    assert await ids() == ["db", "web-1"]
    assert await ids("id==db") == ["db"]
    assert await ids("labels.a==1") == ["web-1"]
    assert await ids("image") == ["web-1"]
    assert await ids("runtime.name~=^io") == ["db", "web-1"]
    assert await ids("runtime") == []
    assert await ids("id==db", "labels.b") == ["db", "web-1"]
    with pytest.raises(InvalidArgument):
        await ids("id=db")
