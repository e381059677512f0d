"""Namespaces: made by name or by what is recorded in them, and removed only when empty."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from services.common.errors import AlreadyExists, InvalidArgument, NotFound
from services.containerd.content.descriptor import Descriptor
from services.containerd.images.store import Image
from services.containerd.namespaces.registry import Namespace, NamespaceInUse
from tests.fakes.metadata import Metadata, open_metadata

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

TARGET = Descriptor("type", "sha256:" + "a" * 64, 1)


@pytest.fixture
async def meta(tmp_path: Path) -> AsyncIterator[Metadata]:
    async with open_metadata(tmp_path) as opened:
        yield opened


async def test_create_find_and_tell(meta: Metadata) -> None:
    await meta.namespaces.create(Namespace("b", {"k": "v", "empty": ""}))
    await meta.namespaces.create(Namespace("a"))
    assert await meta.namespaces.find() == [Namespace("a"), Namespace("b", {"k": "v"})]
    assert await meta.namespaces.get("b") == Namespace("b", {"k": "v"})
    namespace, topic, event = (await meta.events())[0]
    assert (namespace, topic) == ("b", "/namespaces/create")
    assert event is not None
    assert (event.name, dict(event.labels)) == ("b", {"k": "v"})


async def test_create_refuses_what_is_taken_or_malformed(meta: Metadata) -> None:
    await meta.namespaces.create(Namespace("a"))
    with pytest.raises(AlreadyExists):
        await meta.namespaces.create(Namespace("a"))
    for name in ("", "a/b", "..", "-a", "a" * 77):
        with pytest.raises(InvalidArgument):
            await meta.namespaces.create(Namespace(name))


async def test_a_namespace_comes_to_be_with_what_is_recorded_in_it(meta: Metadata) -> None:
    await meta.images.create("implicit", Image("x", TARGET))
    await meta.leases.create("leased")
    assert [n.name for n in await meta.namespaces.find()] == ["implicit", "leased"]
    with pytest.raises(AlreadyExists):
        await meta.namespaces.create(Namespace("implicit"))
    await meta.images.delete("implicit", "x")
    assert "implicit" in [n.name for n in await meta.namespaces.find()]


async def test_one_that_is_not_there_has_no_labels(meta: Metadata) -> None:
    assert await meta.namespaces.get("none") == Namespace("none")


async def test_update_by_mask_and_as_a_whole(meta: Metadata) -> None:
    await meta.namespaces.create(Namespace("a", {"x": "1", "y": "2"}))
    updated = await meta.namespaces.update(Namespace("a", {"x": "9"}), ["labels.x", "labels.y"])
    assert updated == Namespace("a", {"x": "9"})
    updated = await meta.namespaces.update(Namespace("a", {"z": "3"}))
    assert updated == await meta.namespaces.get("a") == Namespace("a", {"z": "3"})
    with pytest.raises(InvalidArgument, match="cannot be changed"):
        await meta.namespaces.update(Namespace("a"), ["name"])


async def test_delete_refuses_while_it_holds_things(meta: Metadata) -> None:
    await meta.images.create("a", Image("x", TARGET))
    with pytest.raises(NamespaceInUse, match="still has images"):
        await meta.namespaces.delete("a")
    await meta.images.delete("a", "x")
    await meta.leases.create("a", "l")
    await meta.namespaces.delete("a")
    assert await meta.namespaces.find() == []
    assert await meta.leases.find("a") == []
    assert (await meta.topics())[-1] == "/namespaces/delete"
    with pytest.raises(NotFound):
        await meta.namespaces.delete("a")
